"""Stage `report`: everything that was measured in one experiment, as tables, figures and a page."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from pathlib import Path

from d2o import records
from d2o.errors import D2OError
from d2o.settings import Settings


def write(settings: Settings, results: Path, output: Path) -> None:
    """Write the report of an experiment: first its tables and figures beside `output`, then `output`.

    Args:
        settings: the whole config with one experiment.
        results: folder that holds all artifacts.
        output: the page; `table.csv`, `table.md`, `table.tex`, `figures/` and, where there are snapshots,
            `course.csv` go into its folder.
    Raises:
        D2OError: where an artifact of the experiment is missing or not readable, or there are several experiments.
    """
    if len(settings.experiments) != 1:
        raise D2OError(f"experiments: a report is about one experiment, not {len(settings.experiments)}; split them")
    ((name, experiment),) = settings.experiments.items()

    from d2o import metrics
    from d2o.report import figures, page, paper, people, tables

    archive = metrics.Archive(results)
    declared = metrics.declared(archive, settings)
    blocks = []
    for dataset, model in product(experiment.datasets, experiment.models):
        values = metrics.observe(archive, settings, dataset, model)
        logs = metrics.logs(archive, experiment, dataset, model)
        steps = metrics.course(archive, settings, values, logs, dataset, model)
        blocks.append(
            tables.Block(
                dataset,
                model,
                tables.estimates(values, declared),
                tables.by_seed(values, declared),
                tables.comparisons(values, declared, experiment),
                steps,
                tables.estimates(steps, declared, tables.COURSE),
                logs,
                *metrics.trials(archive, settings, dataset, model),
            )
        )
    categories = {dataset: page.categories(archive, dataset) for dataset in experiment.datasets}
    annotators = archive.manifest("human_verdicts", experiment=name) if experiment.human_eval else None
    summary = people.summary(experiment.human_eval, annotators) if annotators else ()
    measured = tables.Measured(settings, declared, blocks, categories, summary)

    files = {
        "table.csv": tables.table_csv(measured).encode(),
        "table.md": tables.as_markdown(measured).encode(),
        "table.tex": tables.as_latex(measured).encode(),
    }
    if any(len(block.comparisons) for block in blocks):
        comparisons = [block.comparisons for block in blocks]
        files["comparisons.csv"] = tables.as_csv(comparisons, tables.COMPARISONS).encode()
    if any(len(block.course) for block in blocks):
        files["course.csv"] = tables.course_csv(measured).encode()
    for table in experiment.shows:
        files |= paper.TABLES[table](measured).files(table) if table in paper.TABLES else {}
    links = list(files)
    svgs = {}
    for figure, (data, plotted) in figures.plotted(measured).items():
        files[f"figures/{figure}.csv"] = tables.as_csv([data], list(data.columns)).encode()
        files |= {f"figures/{figure}.{kind}": figures.render(plotted, kind) for kind in ("svg", "pdf", "png")}
        svgs[figure] = files[f"figures/{figure}.svg"]
    if experiment.pair_quality:
        svgs["pair_quality"] = archive.content("pair_quality_figure", experiment=name)
    pools = [pool for block in blocks for pool in page.pools(archive, settings, block)]
    for pool in pools:
        files[f"figures/{pool['name']}.csv"] = tables.as_csv([pool["data"]], list(pool["data"].columns)).encode()
    html = page.render(settings, archive, measured, svgs, pools, links)
    for file, content in files.items():
        _publish(output.parent / file, content, settings)
    occasional = {
        f"figures/{figure}.{kind}"
        for figure, entry in figures.FIGURES.items()
        if entry.plot
        for kind in ("csv", "svg", "pdf", "png")
    }
    occasional |= {f"{table}.{kind}" for table in paper.TABLES for kind in ("csv", "md", "tex")}
    occasional |= {f"figures/{path.name}" for path in output.parent.glob("figures/pool-*.csv")}
    for file in {"comparisons.csv", "course.csv", *occasional} - files.keys():
        records.discard(output.parent / file)
    _publish(output, html.encode(), settings, archive.inputs, [*files, output.name])


def write_pair_quality(settings: Settings, results: Path, output: Path) -> None:
    """Write Figure 1 of an experiment: `output`; beside it the figure as PDF and PNG and its bars as CSV; in the
    folder above `pair_quality.csv`, its numbers.

    Args:
        settings, results: as in `write`.
        output: the SVG file, in a folder `figures`.
    Raises:
        D2OError: where an artifact is missing or not readable.
    """
    experiment = settings.experiment

    import pandas as pd

    from d2o import metrics
    from d2o.report import figures, pair_quality, tables

    archive = metrics.Archive(results)
    measures = pd.concat([pair_quality.measure(archive, settings, dataset) for dataset in experiment.datasets])
    bars = pair_quality.bars(measures)
    figure = figures.pair_quality(measures, bars, experiment.datasets)
    name = f"{output.parent.name}/{output.stem}"
    files = {
        "pair_quality.csv": pair_quality.as_csv(measures).encode(),
        f"{name}.csv": tables.as_csv([bars], list(bars.columns)).encode(),
        **{f"{name}.{kind}": figures.render(figure, kind) for kind in ("pdf", "png")},
    }
    for file, content in files.items():
        _publish(output.parents[1] / file, content, settings, archive.inputs)
    _publish(output, figures.render(figure, "svg"), settings, archive.inputs, [*files, f"{name}.svg"])


def _publish(
    path: Path, content: bytes, settings: Settings, inputs: Iterable[Path] = (), files: Iterable[str] = ()
) -> None:
    """Write a file with its manifest; `files`, the names of all files of a report, go into that of the last one."""
    with records.artifact(path, settings, inputs) as draft:
        draft.path.write_bytes(content)
        if files:
            draft.facts["files"] = sorted(files)
