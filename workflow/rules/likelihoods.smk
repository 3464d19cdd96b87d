# Log-probs of the held-out human answers: what can be said without any scorer.


rule likelihoods:
    input:
        plan.targets("likelihoods"),


rule score_likelihoods:
    message:
        "Likelihoods under {wildcards.method} (seed {wildcards.seed}{wildcards.snapshot}), {wildcards.model}"
    input:
        model=plan.model_of,
        negatives="<negatives>",
    output:
        "<likelihoods>",
    params:
        model=plan.weights_of,
        settings=plan.params("likelihoods"),
        code=plan.code("references"),
    log:
        "<point>/logs/likelihoods.log",
    benchmark:
        "<point>/logs/likelihoods.benchmark.tsv"
    threads: plan.settings.compute.threads
    resources:
        mem_mb=plan.settings.compute.memory_gb * 1000,
        runtime=plan.settings.compute.minutes,
        gpu=plan.settings.compute.gpus,
    conda:
        plan.environment("train")
    shell:
        "python -m d2o --gpus {resources.gpu} references --settings {params.settings:q} --model {params.model} "
        "--negatives {input.negatives} --split test --output {output} 2>&1 | tee {log}"
