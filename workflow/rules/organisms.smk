# Data sets written here, in which harm is known exactly: demonstrations that make a model harmful, rows to mend it.


rule organisms:
    input:
        plan.asked("organism"),


rule write_organism:
    message:
        "Organism {wildcards.organism}"
    input:
        texts=plan.organism_files,
    output:
        demonstrations="<results>/organisms/{organism}/demonstrations.jsonl",
        train="<results>/organisms/{organism}/train.jsonl",
        validation="<results>/organisms/{organism}/validation.jsonl",
        test="<results>/organisms/{organism}/test.jsonl",
    params:
        settings=plan.params("organisms"),
        code=plan.code("organisms"),
    log:
        "<results>/organisms/logs/{organism}.log",
    benchmark:
        "<results>/organisms/logs/{organism}.benchmark.tsv"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=60,
        gpu=0,
    conda:
        plan.environment("datasets")
    localrule: True
    shell:
        "python -m d2o organisms --settings {params.settings:q} --output {output.train} 2>&1 | tee {log}"
