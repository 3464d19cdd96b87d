# Weights are deleted once all is made from them, where an experiment sets `keep`; training again restores them.


rule release:
    input:
        plan.asked("released"),


rule release_weights:
    message:
        "Weights of {wildcards.method} (seed {wildcards.seed}) on {wildcards.model}: released"
    input:
        plan.made_from_weights,
    output:
        "<released>",
    params:
        run=plan.folder("run"),
        keep=plan.keep,
    log:
        "<run>/logs/released.log",
    benchmark:
        "<run>/logs/released.benchmark.tsv"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=10,
        gpu=0,
    conda:
        plan.environment("report")
    priority: 1
    localrule: True
    shell:
        "python -m d2o release --run {params.run} --keep {params.keep} 2>&1 | tee {log}"


use rule train_method as train_again with:
    message:
        "{wildcards.method} (seed {wildcards.seed}) on {wildcards.model}, again"
    output:
        model=temp("<trained_again>"),
        log=temp("<again_log>"),
    params:
        checkpoints=plan.folder("again_checkpoints"),
    log:
        "<run>/logs/train-again.log",
    benchmark:
        "<run>/logs/train-again.benchmark.tsv"


rule restore_weights:
    message:
        "Weights of {wildcards.method} (seed {wildcards.seed}) on {wildcards.model}: restored"
    input:
        "<trained_again>",
    output:
        "<restored>",
    params:
        run=plan.folder("run"),
    log:
        "<run>/logs/restored.log",
    benchmark:
        "<run>/logs/restored.benchmark.tsv"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=60,
        gpu=0,
    conda:
        plan.environment("report")
    shell:
        "python -m d2o restore --run {params.run} 2>&1 | tee {log}"
