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
    threads: needs.of("responses", "threads")
    resources:
        mem_mb=needs.of("responses", "mem_mb"),
        runtime=needs.of("responses", "runtime"),
        gpu=needs.of("responses", "gpu"),
        execution=plan.execution("responses"),
    conda:
        plan.environment("generation")
    priority: 1
    shell:
        "python -m d2o --gpus {resources.gpu} responses --settings {params.settings:q} --model {params.model} "
        "--prompts {input.prompts} --execution {resources.execution:q} --output {output} 2>&1 | tee {log}"
