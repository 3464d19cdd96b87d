# Log-probs of the held-out human answers: a measure without any scorer.


rule heldout_logprobs:
    input:
        plan.targets("heldout_logprobs"),


rule compute_heldout_logprobs:
    message:
        "Held-out log-probs under {wildcards.method} (seed {wildcards.seed}{wildcards.snapshot}), {wildcards.model}"
    input:
        model=plan.model_of,
        negatives="<negatives>",
    output:
        "<heldout_logprobs>",
    params:
        model=plan.weights_of,
        settings=plan.params("logprobs"),
        code=plan.code("logprobs"),
    log:
        "<point>/logs/heldout_logprobs.log",
    benchmark:
        "<point>/logs/heldout_logprobs.benchmark.tsv"
    threads: needs.of("heldout_logprobs", "threads")
    resources:
        mem_mb=needs.of("heldout_logprobs", "mem_mb"),
        runtime=needs.of("heldout_logprobs", "runtime"),
        gpu=needs.of("heldout_logprobs", "gpu"),
    conda:
        plan.environment("train")
    priority: 1
    shell:
        "python -m d2o --gpus {resources.gpu} logprobs --settings {params.settings:q} --model {params.model} "
        "--negatives {input.negatives} --split held-out --output {output} 2>&1 | tee {log}"
