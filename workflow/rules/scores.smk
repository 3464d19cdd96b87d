# Reward models, and the score of each answer by each of them and by each exact scorer.


rule scores:
    input:
        plan.asked("scores"),


rule fetch_reward:
    message:
        "Reward model {wildcards.reward}"
    input:
        files=plan.reward_files,
    output:
        "<fetched_reward>",
    params:
        settings=plan.params("rewards"),
        code=plan.code("rewards"),
    log:
        "<results>/rewards/logs/{reward}.log",
    benchmark:
        "<results>/rewards/logs/{reward}.benchmark.tsv"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=60,
        gpu=0,
        execution=plan.execution("rewards"),
    conda:
        plan.environment("models")
    localrule: True
    shell:
        "python -m d2o rewards --settings {params.settings:q} --execution {resources.execution:q} --output {output} 2>&1 | tee {log}"


rule train_reward:
    message:
        "Reward model {wildcards.reward} from the labels of {wildcards.dataset}"
    input:
        backbone=plan.backbone,
        rows="<rows>",
        negatives="<negatives>",
    output:
        "<trained_reward>",
    params:
        settings=plan.params("rewards"),
        code=plan.code("rewards"),
    log:
        "<data>/rewards/logs/{reward}.log",
    benchmark:
        "<data>/rewards/logs/{reward}.benchmark.tsv"
    threads: needs.of("rewards", "threads")
    resources:
        mem_mb=needs.of("rewards", "mem_mb"),
        runtime=needs.of("rewards", "runtime"),
        gpu=needs.of("rewards", "gpu"),
    conda:
        plan.environment("train")
    shell:
        "python -m d2o --gpus {resources.gpu} rewards --settings {params.settings:q} --backbone {input.backbone} "
        "--rows {input.rows} --negatives {input.negatives} --output {output} 2>&1 | tee {log}"


rule score_responses:
    message:
        "Scores by {wildcards.reward} of {wildcards.method} (seed {wildcards.seed}{wildcards.snapshot}), {wildcards.model}"
    input:
        reward=plan.reward_model,
        sources=plan.rule_files,
        prompts="<prompts>",
        responses="<responses>",
    output:
        "<scores>",
    params:
        reward=plan.option("reward"),
        settings=plan.params("scores"),
        code=plan.code("scores"),
    log:
        "<point>/logs/scores-{reward}.log",
    benchmark:
        "<point>/logs/scores-{reward}.benchmark.tsv"
    threads: needs.of("scores", "threads")
    resources:
        mem_mb=needs.of("scores", "mem_mb"),
        runtime=needs.of("scores", "runtime"),
        gpu=needs.of("scores", "gpu"),
        execution=plan.execution("scores"),
    conda:
        plan.environment("train")
    shell:
        "python -m d2o --gpus {resources.gpu} scores --settings {params.settings:q} {params.reward} --prompts {input.prompts} "
        "--responses {input.responses} --execution {resources.execution:q} --output {output} 2>&1 | tee {log}"


use rule score_responses as score_positives with:
    message:
        "Scores by {wildcards.reward} of the pool {wildcards.pool}, {wildcards.model}"
    input:
        reward=plan.reward_model,
        sources=plan.rule_files,
        prompts="<negatives>",
        responses="<pool>",
    output:
        "<pool_scores>",
    log:
        "<base>/logs/scores-{pool}-{reward}.log",
    benchmark:
        "<base>/logs/scores-{pool}-{reward}.benchmark.tsv"
