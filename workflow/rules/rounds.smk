# Online rounds: train up to a boundary, sample fresh positives from the policy, get their reference log-probs, go on.


use rule train_method as train_to_round with:
    message:
        "{wildcards.method} (seed {wildcards.seed}) on {wildcards.model}, up to round {wildcards.round}"
    output:
        model="<round_policy>",
        negatives="<round_negatives>",
    log:
        "<run>/logs/round{round}-train.log",
    benchmark:
        "<run>/logs/round{round}-train.benchmark.tsv"


use rule sample_positives as sample_round with:
    message:
        "Round {wildcards.round} of {wildcards.method} (seed {wildcards.seed}), {wildcards.model}"
    input:
        model="<round_policy>",
        negatives="<round_negatives>",
    output:
        samples=temp("<round_shard>"),
        manifest=temp("<round_shard>.manifest.json"),
    params:
        shard="1-of-1",
        sampled=plan.folder("round_sampled"),
        settings=plan.params("rounds"),
        code=plan.code("positives"),
    log:
        "<run>/logs/round{round}-sample.log",
    benchmark:
        "<run>/logs/round{round}-sample.benchmark.tsv"


use rule merge_positives as merge_round with:
    message:
        "The pool of round {wildcards.round} of {wildcards.method} (seed {wildcards.seed}), {wildcards.model}"
    input:
        model="<round_policy>",
        negatives="<round_negatives>",
        shards="<round_shard>",
        manifests="<round_shard>.manifest.json",
    output:
        pool="<round_pool>",
        sheet="<round_sheet>",
    params:
        shards=plan.option("shards"),
        settings=plan.params("rounds"),
        code=plan.code("positives"),
    log:
        "<run>/logs/round{round}-pool.log",
    benchmark:
        "<run>/logs/round{round}-pool.benchmark.tsv"


use rule compute_reference_logprobs as compute_round_logprobs with:
    message:
        "Reference log-probs of round {wildcards.round} of {wildcards.method} (seed {wildcards.seed}), {wildcards.model}"
    input:
        model="<model>",
        negatives="<round_negatives>",
        samples="<round_pool>",
    output:
        "<round_logprobs>",
    log:
        "<run>/logs/round{round}-logprobs.log",
    benchmark:
        "<run>/logs/round{round}-logprobs.benchmark.tsv"
