"""Picture of several targets within limits: what each costs in log-probability, and which limits bind."""

from matplotlib.figure import Figure

from tools.report.figures import BLACK, BLUE, GREEN, ORANGE, PURPLE

BINDING = 0.99
"""Share of a limit from which it is drawn as binding."""


def targets_figure(fits: list[dict], unit: str) -> Figure:
    """Draw the log-probability that each target gives up, and the share of each limit that its network uses.

    Args:
        fits: of each target, see `models.limits.describe_fit`.
        unit: of the targets.
    """
    fits = sorted(fits, key=lambda fit: fit['target'])
    targets = [fit['target'] for fit in fits]
    figure = Figure(figsize=(6.4, 5.0))
    top, bottom = figure.subplots(2, 1, sharex=True)
    top.plot(targets, [fit['given_up'] for fit in fits], 'o-', color=BLUE)
    top.set_ylabel('log-probability given up')
    top.set_ylim(bottom=0)
    top.set_title('What each target costs against the most probable architecture')
    bottom.axhline(100, color=BLACK, linewidth=0.9)
    for i, name in enumerate(fits[0]['used']):
        colour, mark = (ORANGE, GREEN, PURPLE, BLUE)[i % 4], 'os^D'[i % 4]
        used = [100 * fit['used'][name] for fit in fits]
        bottom.plot(targets, used, f'{mark}--', color=colour, mfc='white', label=name)
        binding = [(x, y) for x, y in zip(targets, used, strict=True) if y >= 100 * BINDING]
        bottom.plot([x for x, _ in binding], [y for _, y in binding], mark, color=colour)
    bottom.set_ylabel('share of the limit in %')
    bottom.set_xlabel(f'target in {unit}')
    bottom.set_title('Limits by their tables (filled: binds)')
    bottom.legend(loc='best')
    for axis in (top, bottom):
        axis.grid(color='#E0E0E0', linewidth=0.6)
    return figure
