"""Stage `report`: everything that was measured in one experiment, as tables, figures and a page."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from d2o import records
from d2o.errors import D2OError
from d2o.settings import Settings

# Of a report's files, those that are there only where there is something to show.
_OCCASIONAL = [
    "course.csv",
    *(
        f"figures/{name}.{kind}"
        for name in ("effect", "course", "distributions", "categories")
        for kind in ("svg", "png")
    ),
]


def write(settings: Settings, results: Path, output: Path) -> None:
    """Write the report of an experiment: `output` last, its tables and figures beside it before.

    Args:
        settings: the whole config with one experiment.
        results: folder that holds everything made.
        output: the page; `table.csv`, `table.md`, `figures/` and, where there are snapshots, `course.csv` go into its
            folder.
    Raises:
        D2OError: where an artifact of the experiment is missing or not readable, or there are several experiments.
    """
    if len(settings.experiments) != 1:
        raise D2OError(f"experiments: a report is about one experiment, not {len(settings.experiments)}; split them")
    ((name, experiment),) = settings.experiments.items()

    from d2o.report import figures, metrics, page, tables

    archive = metrics.Archive(results)
    blocks = [
        tables.Block(
            dataset,
            model,
            tables.cells(dataset, model, metrics.observe(archive, settings, dataset, model)),
            metrics.logs(archive, experiment, dataset, model),
            tables.points(metrics.courses(archive, settings, dataset, model)),
        )
        for dataset in experiment.datasets
        for model in experiment.models
    ]
    categories = {dataset: page.categories(archive, dataset) for dataset in experiment.datasets}
    drawn = {
        "methods": figures.methods(blocks, experiment.methods),
        "training": figures.training(blocks, experiment.methods),
    }
    if any(tables.effect(block, experiment.methods) for block in blocks):
        drawn["effect"] = figures.effect(blocks, experiment.methods)
    if any(categories.values()):
        drawn["categories"] = figures.categories({name: found for name, found in categories.items() if found})
    files = {
        "table.csv": tables.as_csv(blocks).encode(),
        "table.md": tables.as_markdown(blocks, experiment.methods).encode(),
    }
    if any(block.course for block in blocks):
        drawn["course"] = figures.course(blocks, experiment.methods)
        files["course.csv"] = tables.course_as_csv(blocks).encode()
        if any(block.scored for block in blocks):
            drawn["distributions"] = figures.distributions(blocks, experiment.methods)
    for figure in drawn:
        for kind in ("svg", "png"):
            files[f"figures/{figure}.{kind}"] = figures.render(drawn[figure], kind)
    svgs = {figure: files[f"figures/{figure}.svg"] for figure in drawn}
    if experiment.quality:
        svgs["quality"] = archive.content(f"reports/{name}/figures/quality.svg")
    html = page.render(settings, archive, blocks, svgs)
    for file, content in files.items():
        _publish(output.parent / file, content, settings)
    for file in set(_OCCASIONAL) - files.keys():
        records.discard(output.parent / file)
    _publish(output, html.encode(), settings, archive.inputs)


def write_quality(settings: Settings, results: Path, output: Path) -> None:
    """Write Figure 1 of an experiment: `output`, the same as PNG beside it, and `quality.csv` in the folder above.

    Args:
        settings, results: as in `write`.
        output: the SVG file, in a folder `figures`.
    Raises:
        D2OError: where an artifact is missing or not readable.
    """
    (experiment,) = settings.experiments.values()

    from d2o.report import figures, metrics, quality

    archive = metrics.Archive(results)
    measures = [m for dataset in experiment.datasets for m in quality.measure(archive, settings, dataset)]
    figure = figures.quality(measures, experiment.datasets)
    _publish(output.parent.parent / "quality.csv", quality.as_csv(measures).encode(), settings, archive.inputs)
    _publish(output.with_suffix(".png"), figures.render(figure, "png"), settings, archive.inputs)
    _publish(output, figures.render(figure, "svg"), settings, archive.inputs)


def _publish(path: Path, content: bytes, settings: Settings, inputs: Iterable[Path] = ()) -> None:
    with records.artifact(path, settings, inputs) as draft:
        draft.path.write_bytes(content)
