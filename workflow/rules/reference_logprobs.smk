# Log-probs of every response under the initial model, once for all methods that use them.


rule reference_logprobs:
    input:
        plan.asked("reference_logprobs"),


rule compute_reference_logprobs:
    message:
        "Reference log-probs ({wildcards.table}) of {wildcards.model} on {wildcards.dataset}"
    input:
        unpack(plan.reference_inputs),
        model="<model>",
    output:
        "<reference_logprobs>",
    params:
        samples=plan.option("samples"),
        settings=plan.params("logprobs"),
        code=plan.code("logprobs"),
    log:
        "<base>/logs/reference_logprobs-{table}.log",
    benchmark:
        "<base>/logs/reference_logprobs-{table}.benchmark.tsv"
    threads: needs.of("reference_logprobs", "threads")
    resources:
        mem_mb=needs.of("reference_logprobs", "mem_mb"),
        runtime=needs.of("reference_logprobs", "runtime"),
        gpu=needs.of("reference_logprobs", "gpu"),
    conda:
        plan.environment("train")
    shell:
        "python -m d2o --gpus {resources.gpu} logprobs --settings {params.settings:q} --model {input.model} "
        "--negatives {input.negatives} {params.samples} --output {output} 2>&1 | tee {log}"
