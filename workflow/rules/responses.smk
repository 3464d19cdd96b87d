# A model's answers to the test and evaluation prompts; those of its snapshots lie in step<n>/.


rule responses:
    input:
        plan.targets("responses"),


rule answer_prompts:
    message:
        "Responses of {wildcards.method} (seed {wildcards.seed}{wildcards.snapshot}), {wildcards.model}"
    input:
        model=plan.model_of,
        prompts="<prompts>",
    output:
        "<responses>",
    params:
        model=plan.weights_of,
        settings=plan.params("responses"),
        code=plan.code("responses"),
    log:
        "<point>/logs/responses.log",
    benchmark:
        "<point>/logs/responses.benchmark.tsv"
    threads: plan.settings.compute.threads
    resources:
        mem_mb=plan.settings.compute.memory_gb * 1000,
        runtime=plan.settings.compute.minutes,
        gpu=plan.settings.compute.gpus,
        execution=plan.execution("responses"),
    conda:
        plan.environment("generation")
    shell:
        "python -m d2o --gpus {resources.gpu} responses --settings {params.settings:q} --model {params.model} "
        "--prompts {input.prompts} --execution {resources.execution:q} --output {output} 2>&1 | tee {log}"
