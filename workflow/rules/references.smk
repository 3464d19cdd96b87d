# Log-probs of every response under the initial model, once for all methods that use them.


rule references:
    input:
        plan.targets("references"),


rule score_references:
    message:
        "References ({wildcards.table}) of {wildcards.model} on {wildcards.dataset}"
    input:
        unpack(plan.reference_inputs),
        model="<model>",
    output:
        "<references>",
    params:
        samples=plan.option("samples"),
        settings=plan.params("references"),
        code=plan.code("references"),
    log:
        "<base>/logs/references-{table}.log",
    benchmark:
        "<base>/logs/references-{table}.benchmark.tsv"
    threads: plan.settings.compute.threads
    resources:
        mem_mb=plan.settings.compute.memory_gb * 1000,
        runtime=plan.settings.compute.minutes,
        gpu=plan.settings.compute.gpus,
    conda:
        plan.environment("train")
    shell:
        "python -m d2o --gpus {resources.gpu} references --settings {params.settings:q} --model {input.model} "
        "--negatives {input.negatives} {params.samples} --output {output} 2>&1 | tee {log}"
