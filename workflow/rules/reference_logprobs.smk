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
    threads: plan.settings.compute.threads
    resources:
        mem_mb=plan.settings.compute.memory_gb * 1000,
        runtime=plan.settings.compute.minutes,
        gpu=plan.settings.compute.gpus,
    conda:
        plan.environment("train")
    shell:
        "python -m d2o --gpus {resources.gpu} logprobs --settings {params.settings:q} --model {input.model} "
        "--negatives {input.negatives} {params.samples} --output {output} 2>&1 | tee {log}"
