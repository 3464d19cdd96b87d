# Reward models, and their score for each answer; exact scorers' as well.


rule scores:
    input:
        plan.targets("scores"),


rule fetch_reward:
    message:
        "Reward model {wildcards.reward}"
    input:
        files=plan.reward_files,
    output:
        "results/rewards/{reward}/manifest.json",
    params:
        settings=plan.params("rewards"),
        code=plan.code("rewards"),
    log:
        "results/rewards/logs/{reward}.log",
    benchmark:
        "results/rewards/logs/{reward}.benchmark.tsv"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=60,
        gpu=0,
    conda:
        "../../envs/models.yaml"
    shell:
        "python -m d2o rewards --settings {params.settings:q} --output {output} 2>&1 | tee {log}"


rule train_reward:
    message:
        "Reward model {wildcards.reward} from the labels of {wildcards.dataset}"
    input:
        backbone=plan.backbone,
        rows="results/{dataset}/rows.parquet",
        negatives="results/{dataset}/negatives.parquet",
    output:
        "results/{dataset}/rewards/{reward}/manifest.json",
    params:
        settings=plan.params("rewards"),
        code=plan.code("rewards"),
    log:
        "results/{dataset}/rewards/logs/{reward}.log",
    benchmark:
        "results/{dataset}/rewards/logs/{reward}.benchmark.tsv"
    threads: plan.settings.compute.threads
    resources:
        mem_mb=plan.settings.compute.memory_gb * 1000,
        runtime=plan.settings.compute.minutes,
        gpu=plan.settings.compute.gpus,
    conda:
        "../../envs/train.yaml"
    shell:
        "python -m d2o --gpus {resources.gpu} rewards --settings {params.settings:q} --backbone {input.backbone} "
        "--rows {input.rows} --negatives {input.negatives} --output {output} 2>&1 | tee {log}"


rule score_responses:
    message:
        "Scores by {wildcards.reward} of {wildcards.method} (seed {wildcards.seed}{wildcards.snapshot}), {wildcards.model}"
    input:
        reward=plan.reward_model,
        sources=plan.rule_files,
        prompts="results/{dataset}/prompts.parquet",
        responses="results/{dataset}/{model}/{method}/seed{seed}{snapshot}/responses.parquet",
    output:
        "results/{dataset}/{model}/{method}/seed{seed}{snapshot}/scores/{reward}.parquet",
    params:
        reward=plan.option("reward"),
        settings=plan.params("scores"),
        code=plan.code("scores"),
    log:
        "results/{dataset}/{model}/{method}/seed{seed}{snapshot}/logs/scores-{reward}.log",
    benchmark:
        "results/{dataset}/{model}/{method}/seed{seed}{snapshot}/logs/scores-{reward}.benchmark.tsv"
    threads: plan.scoring("threads")
    resources:
        mem_mb=plan.scoring("mem_mb"),
        runtime=plan.scoring("runtime"),
        gpu=plan.scoring("gpu"),
    conda:
        "../../envs/train.yaml"
    shell:
        "python -m d2o --gpus {resources.gpu} scores --settings {params.settings:q} {params.reward} "
        "--prompts {input.prompts} --responses {input.responses} --output {output} 2>&1 | tee {log}"


use rule score_responses as score_positives with:
    message:
        "Scores by {wildcards.reward} of the pool {wildcards.pool}, {wildcards.model}"
    input:
        reward=plan.reward_model,
        sources=plan.rule_files,
        prompts="results/{dataset}/negatives.parquet",
        responses="results/{dataset}/{model}/positives/{pool}.parquet",
    output:
        "results/{dataset}/{model}/positives/{pool}.scores/{reward}.parquet",
    log:
        "results/{dataset}/{model}/logs/scores-{pool}-{reward}.log",
    benchmark:
        "results/{dataset}/{model}/logs/scores-{pool}-{reward}.benchmark.tsv"
