# A data set's human pairs, scored and judged as a model's answers are, and plotted: Figure 1.


rule pair_quality:
    input:
        plan.asked("pair_quality_figure"),


rule choose_pairs:
    message:
        "Human pairs of {wildcards.dataset}"
    input:
        pairs="<pairs>",
    output:
        prompts="<pair_prompts>",
        chosen="<data>/pair_quality/chosen.parquet",
        rejected="<data>/pair_quality/rejected.parquet",
    params:
        settings=plan.params("pair_quality"),
        code=plan.code("pair_quality"),
    log:
        "<data>/pair_quality/logs/pairs.log",
    benchmark:
        "<data>/pair_quality/logs/pairs.benchmark.tsv"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=60,
        gpu=0,
    conda:
        plan.environment("datasets")
    localrule: True
    shell:
        "python -m d2o pair-quality --settings {params.settings:q} --pairs {input.pairs} "
        "--output {output.prompts} 2>&1 | tee {log}"


use rule score_responses as score_pairs with:
    message:
        "Scores by {wildcards.reward} of the {wildcards.preference} answers of {wildcards.dataset}"
    input:
        reward=plan.reward_model,
        sources=plan.rule_files,
        prompts="<pair_prompts>",
        responses="<pair_responses>",
    output:
        "<pair_scores>",
    log:
        "<data>/pair_quality/logs/scores-{reward}-{preference}.log",
    benchmark:
        "<data>/pair_quality/logs/scores-{reward}-{preference}.benchmark.tsv"


use rule judge_responses as judge_pairs with:
    message:
        "Verdicts of {wildcards.judge} on the human pairs of {wildcards.dataset}"
    input:
        prompts="<pair_prompts>",
        initial="<data>/pair_quality/rejected.parquet",
        responses="<data>/pair_quality/chosen.parquet",
    output:
        "<pair_verdicts>",
    log:
        "<data>/pair_quality/logs/judge-{judge}.log",
    benchmark:
        "<data>/pair_quality/logs/judge-{judge}.benchmark.tsv"


rule plot_pair_quality:
    message:
        "Figure 1 of {wildcards.experiment}"
    input:
        plan.pair_inputs,
    output:
        figure=report(
            "<pair_quality_figure>",
            caption="../report/figure.rst",
            category="{experiment}",
            labels={"what": "human pairs"},
        ),
        table="<report_folder>/pair_quality.csv",
    params:
        settings=plan.params("report"),
        code=plan.code("report"),
    log:
        "<reports>/logs/{experiment}-pair-quality.log",
    benchmark:
        "<reports>/logs/{experiment}-pair-quality.benchmark.tsv"
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
        "python -m d2o pair-quality-figure --settings {params.settings:q} --results {resources.results:q} "
        "--output {output.figure} 2>&1 | tee {log}"
