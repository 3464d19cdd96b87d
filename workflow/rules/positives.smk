# Self-generated answers to the train prompts: `corrected` with instructions, `plain` without; sampled in shards.


rule positives:
    input:
        plan.asked("pool"),


rule sample_positives:
    message:
        "Positives ({wildcards.pool}, {wildcards.shard}) of {wildcards.model} on {wildcards.dataset}"
    input:
        model="<model>",
        negatives="<negatives>",
    output:
        samples=temp("<pool_shard>"),
        manifest=temp("<pool_shard>.manifest.json"),
    params:
        shard="{shard}",
        sampled=plan.folder("sampled"),
        settings=plan.params("positives"),
        code=plan.code("positives"),
    log:
        "<base>/logs/positives-{pool}-{shard}.log",
    benchmark:
        "<base>/logs/positives-{pool}-{shard}.benchmark.tsv"
    threads: needs.of("positives", "threads")
    resources:
        mem_mb=needs.of("positives", "mem_mb"),
        runtime=needs.of("positives", "runtime"),
        gpu=needs.of("positives", "gpu"),
        execution=plan.execution("sampling"),
    conda:
        plan.environment("generation")
    shell:
        "python -m d2o --gpus {resources.gpu} positives --settings {params.settings:q} --model {input.model} "
        "--negatives {input.negatives} --shard {params.shard} --sampled {params.sampled} "
        "--execution {resources.execution:q} --output {output.samples} 2>&1 | tee {log}"


rule merge_positives:
    message:
        "The pool of positives ({wildcards.pool}) of {wildcards.model} on {wildcards.dataset}"
    input:
        unpack(plan.pool_shards),
        model="<model>",
        negatives="<negatives>",
    output:
        pool="<pool>",
        sheet="<pool_sheet>",
    params:
        shards=plan.option("shards"),
        settings=plan.params("positives"),
        code=plan.code("positives"),
    log:
        "<base>/logs/positives-{pool}.log",
    benchmark:
        "<base>/logs/positives-{pool}.benchmark.tsv"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=60,
        gpu=0,
    conda:
        plan.environment("generation")
    shell:
        "python -m d2o pool --settings {params.settings:q} --model {input.model} "
        "--negatives {input.negatives} {params.shards} --output {output.pool} 2>&1 | tee {log}"
