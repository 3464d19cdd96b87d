# Self-generated answers to the train prompts: `corrected` with instructions, `plain` without.


rule positives:
    input:
        plan.targets("positives"),


rule sample_positives:
    message:
        "Positives ({wildcards.pool}) of {wildcards.model} on {wildcards.dataset}"
    input:
        model="results/models/{model}/manifest.json",
        negatives="results/{dataset}/negatives.parquet",
    output:
        "results/{dataset}/{model}/positives/{pool}.parquet",
    params:
        settings=plan.params("positives"),
        code=plan.code("positives"),
    log:
        "results/{dataset}/{model}/logs/positives-{pool}.log",
    benchmark:
        "results/{dataset}/{model}/logs/positives-{pool}.benchmark.tsv"
    threads: plan.settings.compute.threads
    resources:
        mem_mb=plan.settings.compute.memory_gb * 1000,
        runtime=plan.settings.compute.minutes,
        gpu=plan.settings.compute.gpus,
    conda:
        "../../envs/generation.yaml"
    shell:
        "python -m d2o --gpus {resources.gpu} positives --settings {params.settings:q} --model {input.model} "
        "--negatives {input.negatives} --output {output} 2>&1 | tee {log}"
