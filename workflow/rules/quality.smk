# A data set's human pairs, scored and judged as a model's answers are, and drawn: Figure 1.


rule quality:
    input:
        plan.targets("quality_figure"),


rule sample_pairs:
    message:
        "Human pairs of {wildcards.dataset}"
    input:
        pairs="<pairs>",
    output:
        prompts="<pair_prompts>",
        chosen="<data>/quality/chosen.parquet",
        rejected="<data>/quality/rejected.parquet",
    params:
        settings=plan.params("quality"),
        code=plan.code("quality"),
    log:
        "<data>/quality/logs/sample.log",
    benchmark:
        "<data>/quality/logs/sample.benchmark.tsv"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=60,
        gpu=0,
    conda:
        plan.environment("datasets")
    shell:
        "python -m d2o quality --settings {params.settings:q} --pairs {input.pairs} "
        "--output {output.prompts} 2>&1 | tee {log}"


use rule score_responses as score_pairs with:
    message:
        "Scores by {wildcards.reward} of the {wildcards.side} answers of {wildcards.dataset}"
    input:
        reward=plan.reward_model,
        sources=plan.rule_files,
        prompts="<pair_prompts>",
        responses="<pair_responses>",
    output:
        "<pair_scores>",
    log:
        "<data>/quality/logs/scores-{reward}-{side}.log",
    benchmark:
        "<data>/quality/logs/scores-{reward}-{side}.benchmark.tsv"


use rule judge_responses as judge_pairs with:
    message:
        "Verdicts of {wildcards.judge} on the human pairs of {wildcards.dataset}"
    input:
        prompts="<pair_prompts>",
        initial="<data>/quality/rejected.parquet",
        responses="<data>/quality/chosen.parquet",
    output:
        "<pair_verdicts>",
    log:
        "<data>/quality/logs/judge-{judge}.log",
    benchmark:
        "<data>/quality/logs/judge-{judge}.benchmark.tsv"


rule draw_pairs:
    message:
        "Figure 1 of {wildcards.experiment}"
    input:
        plan.pair_inputs,
    output:
        figure=report(
            "<quality_figure>",
            caption="../report/quality.rst",
            category="{experiment}",
            labels={"what": "human pairs"},
        ),
        table="<report_folder>/quality.csv",
    params:
        settings=plan.params("report"),
        code=plan.code("report"),
    log:
        "<reports>/logs/{experiment}-quality.log",
    benchmark:
        "<reports>/logs/{experiment}-quality.benchmark.tsv"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=60,
        gpu=0,
    conda:
        plan.environment("report")
    localrule: True
    shell:
        "python -m d2o figure1 --settings {params.settings:q} --output {output.figure} 2>&1 | tee {log}"
