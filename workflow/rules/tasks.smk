# Tasks of lm-evaluation-harness: each task's questions, those that occur in train prompts, and every model's answers.


rule tasks:
    input:
        plan.asked("task_values"),


rule fetch_questions:
    message:
        "Questions of {wildcards.task}"
    input:
        files=plan.task_files,
    output:
        "<questions>",
    params:
        settings=plan.params("questions"),
        code=plan.code("questions"),
    log:
        "<results>/tasks/logs/{task}.log",
    benchmark:
        "<results>/tasks/logs/{task}.benchmark.tsv"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=60,
        gpu=0,
        metric=plan.metric,
    conda:
        plan.environment("tasks")
    localrule: True
    shell:
        "python -m d2o questions --settings {params.settings:q} {resources.metric} --output {output} 2>&1 | tee {log}"


rule find_leaks:
    message:
        "Questions of {wildcards.task} in the train prompts of {wildcards.dataset}"
    input:
        tables=["<negatives>", "<pairs>"],
        questions="<questions>",
    output:
        "<leaks>",
    params:
        tables=plan.option("tables"),
        settings=plan.params("negatives"),
        code=plan.code("negatives.task_leaks"),
    log:
        "<data>/logs/leaks-{task}.log",
    benchmark:
        "<data>/logs/leaks-{task}.benchmark.tsv"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=60,
        gpu=0,
    conda:
        plan.environment("datasets")
    shell:
        "POLARS_MAX_THREADS={threads} python -m d2o leaks --settings {params.settings:q} {params.tables} "
        "--questions {input.questions} --output {output} 2>&1 | tee {log}"


rule answer_questions:
    message:
        "{wildcards.task} of {wildcards.method} (seed {wildcards.seed}{wildcards.snapshot}), {wildcards.model}"
    input:
        model=plan.model_of,
        questions="<questions>",
    output:
        "<task_values>",
    params:
        model=plan.weights_of,
        settings=plan.params("tasks"),
        code=plan.code("tasks"),
    log:
        "<point>/logs/tasks-{task}.log",
    benchmark:
        "<point>/logs/tasks-{task}.benchmark.tsv"
    threads: needs.of("tasks", "threads")
    resources:
        mem_mb=needs.of("tasks", "mem_mb"),
        runtime=needs.of("tasks", "runtime"),
        gpu=needs.of("tasks", "gpu"),
    conda:
        plan.environment("tasks")
    priority: 1
    shell:
        "python -m d2o --gpus {resources.gpu} tasks --settings {params.settings:q} --model {params.model} "
        "--questions {input.questions} --output {output} 2>&1 | tee {log}"
