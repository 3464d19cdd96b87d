# One model aligned with one method; resumes from its checkpoints. A tuned method is trained as its best trial.


rule train:
    input:
        plan.asked("trained"),


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
        tuned=plan.option("tuned"),
        settings=plan.params("train"),
        code=plan.code("train"),
    log:
        "<run>/logs/train.log",
    benchmark:
        "<run>/logs/train.benchmark.tsv"
    threads: needs.of("train", "threads")
    resources:
        mem_mb=needs.of("train", "mem_mb"),
        runtime=needs.of("train", "runtime"),
        gpu=needs.training("gpu"),
        leased=needs.training("leased"),
        nodes=needs.training("nodes"),
        tasks=needs.training("tasks"),
        mpi=needs.training("mpi"),
        gres=needs.training("gres"),
        execution=plan.execution("train"),
    conda:
        plan.environment("train")
    # A scheduler sends SIGTERM to all processes of a job. The training writes a checkpoint first: shell and tee wait for it.
    shell:
        "trap : TERM; python -m d2o --gpus {resources.leased} train --settings {params.settings:q} --model {input.model} "
        "--negatives {input.negatives} {params.samples} {params.scores} {params.reference_logprobs} "
        "{params.fresh} {params.fresh_logprobs} {params.tuned} "
        "--checkpoints {params.checkpoints} --execution {resources.execution:q} --output {output.model} 2>&1 | (trap '' TERM; exec tee {log})"


rule choose_trial:
    message:
        "The best trial of {wildcards.method}, {wildcards.model}"
    input:
        unpack(plan.trial_inputs),
        prompts="<prompts>",
        negatives="<negatives>",
    output:
        "<tuned>",
    params:
        settings=plan.params("tune"),
        code=plan.code("tune"),
    log:
        "<base>/{method}/logs/tune.log",
    benchmark:
        "<base>/{method}/logs/tune.benchmark.tsv"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=60,
        gpu=0,
        results=plan.settings.results,
    conda:
        plan.environment("report")
    localrule: True
    shell:
        "python -m d2o tune --settings {params.settings:q} --results {resources.results:q} "
        "--dataset {wildcards.dataset} --model {wildcards.model} --output {output} 2>&1 | tee {log}"
