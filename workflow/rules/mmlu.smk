# Multiple-choice questions, and the accuracy of each model on them.


rule mmlu:
    input:
        plan.targets("answers"),


rule fetch_questions:
    message:
        "Questions of {wildcards.benchmark}"
    input:
        files=plan.benchmark_files,
    output:
        "<questions>",
    params:
        settings=plan.params("questions"),
        code=plan.code("questions"),
    log:
        "<results>/benchmarks/logs/{benchmark}.log",
    benchmark:
        "<results>/benchmarks/logs/{benchmark}.benchmark.tsv"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=60,
        gpu=0,
    conda:
        plan.environment("datasets")
    localrule: True
    shell:
        "python -m d2o questions --settings {params.settings:q} --output {output} 2>&1 | tee {log}"


rule answer_questions:
    message:
        "{wildcards.benchmark} of {wildcards.method} (seed {wildcards.seed}), {wildcards.model}"
    input:
        model=plan.model_of,
        questions="<questions>",
    output:
        "<answers>",
    params:
        settings=plan.params("mmlu"),
        code=plan.code("mmlu"),
    log:
        "<run>/logs/mmlu-{benchmark}.log",
    benchmark:
        "<run>/logs/mmlu-{benchmark}.benchmark.tsv"
    threads: plan.settings.compute.threads
    resources:
        mem_mb=plan.settings.compute.memory_gb * 1000,
        runtime=plan.settings.compute.minutes,
        gpu=plan.settings.compute.gpus,
    conda:
        plan.environment("mmlu")
    shell:
        "python -m d2o --gpus {resources.gpu} mmlu --settings {params.settings:q} --model {input.model} "
        "--questions {input.questions} --output {output} 2>&1 | tee {log}"
