# Pairwise verdicts against the initial model.


rule judge:
    input:
        plan.asked("verdicts"),


rule judge_responses:
    message:
        "Verdicts of {wildcards.judge} on {wildcards.method} (seed {wildcards.seed}), {wildcards.model}"
    input:
        prompts="<prompts>",
        initial=plan.initial_responses,
        responses="<run>/responses.parquet",
    output:
        "<verdicts>",
    params:
        settings=plan.params("judge"),
        code=plan.code("judge"),
    log:
        "<run>/logs/judge-{judge}.log",
    benchmark:
        "<run>/logs/judge-{judge}.benchmark.tsv"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=600,
        gpu=0,
        requests=lambda wildcards: plan.settings.judges[wildcards.judge].concurrency,
        execution=plan.execution("judge"),
    conda:
        plan.environment("judge")
    localrule: True
    shell:
        "python -m d2o judge --settings {params.settings:q} --prompts {input.prompts} "
        "--initial {input.initial} --responses {input.responses} "
        "--execution {resources.execution:q} --output {output} 2>&1 | tee {log}"
