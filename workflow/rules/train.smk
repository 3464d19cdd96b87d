# One model aligned with one method; resumes from its checkpoints.


rule train:
    input:
        plan.targets("trained"),


rule train_method:
    message:
        "{wildcards.method} (seed {wildcards.seed}) on {wildcards.model}"
    input:
        unpack(plan.train_inputs),
        model="<model>",
    output:
        model="<trained>",
        log="<train_log>",
    params:
        checkpoints=plan.folder("checkpoints"),
        samples=plan.option("samples"),
        scores=plan.option("scores"),
        reference_logprobs=plan.option("reference_logprobs"),
        fresh=plan.option("fresh"),
        fresh_logprobs=plan.option("fresh_logprobs"),
        settings=plan.params("train"),
        code=plan.code("train"),
    log:
        "<run>/logs/train.log",
    benchmark:
        "<run>/logs/train.benchmark.tsv"
    threads: plan.settings.compute.threads
    resources:
        mem_mb=plan.settings.compute.memory_gb * 1000,
        runtime=plan.settings.compute.minutes,
        gpu=plan.training_gpus,
        execution=plan.execution("train"),
    conda:
        plan.environment("train")
    shell:
        "python -m d2o --gpus {resources.gpu} train --settings {params.settings:q} --model {input.model} "
        "--negatives {input.negatives} {params.samples} {params.scores} {params.reference_logprobs} "
        "{params.fresh} {params.fresh_logprobs} "
        "--checkpoints {params.checkpoints} --execution {resources.execution:q} --output {output.model} 2>&1 | tee {log}"
