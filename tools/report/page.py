"""`report.html`: pictures, tables, flags and environment of a run in one file that needs no server."""

import base64
from html import escape

from tools.report.figures import with_measured
from tools.run import Run

CSS = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em; color: #111; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #ccc; }
img { max-width: 100%; height: auto; } figure { margin: 1em 0; } figcaption { color: #444; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 2px 10px 2px 0; text-align: left; vertical-align: top; }
th { border-bottom: 1px solid #888; }
td.n, th.n { text-align: right; white-space: nowrap; }
.wide { overflow-x: auto; } code { font-size: 13px; }
"""


def make_report(run: Run, pictures: dict[str, tuple[str, bytes]]) -> str:
    """Return the HTML of the page.

    Args:
        pictures: name -> (caption, SVG).
    """
    network = run.header.get('network') or (run.of('epoch')[-1]['network'] if run.of('epoch') else None)
    parts = [f'<h1>{escape(run.name)}</h1>', _summary(run)]
    for name, (caption, svg) in pictures.items():
        data = base64.b64encode(svg).decode()
        image = f'<img alt="{escape(caption)}" src="data:image/svg+xml;base64,{data}">'
        parts.append(f'<h2 id="{name}">{name.capitalize()}</h2><figure>{image}')
        parts.append(f'<figcaption>{escape(caption)}</figcaption></figure>')
    if network:
        parts += ['<h2>Blocks</h2>', _blocks(run, network)]
    parts += ['<h2>Epochs</h2>', _epochs(run)]
    for title, values in (('Flags', run.header['flags']), ('Environment', run.header['environment'])):
        parts += [f'<h2>{title}</h2>', _table(('name', 'value'), list(values.items()))]
    head = f'<meta charset="utf-8"><title>{escape(run.name)}</title><style>{CSS}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def make_comparison(names: list[str], rows: list[list], pictures: dict[str, bytes]) -> str:
    """Return the HTML of a comparison of runs.

    Args:
        names, rows: of its table, a row a run.
        pictures: name -> SVG.
    """
    parts = ['<h1>Comparison</h1>', _table(names, rows)]
    for name, svg in pictures.items():
        data = base64.b64encode(svg).decode()
        parts.append(f'<figure><img alt="{escape(name)}" src="data:image/svg+xml;base64,{data}"></figure>')
    head = f'<meta charset="utf-8"><title>Comparison</title><style>{CSS}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def _blocks(run: Run, network: dict) -> str:
    """Return the table of a network's blocks, with latencies by the table and measured, if there are any."""
    columns = {
        'kernel': 'kernel (pixels)', 'stride': 'stride', 'size': 'input size (pixels)', 'in': 'input channels',
        'mid': 'mid channels', 'out': 'output channels', 'se': 'SE channels', 'act': 'activation', 'macs': 'MACs (M)',
        'latency': f'latency by the table ({network["unit"]})', 'measured': 'measured latency (ms)',
    }  # fmt: skip
    timed = with_measured(run, network)
    rows = [row | {'measured': None} for row in network['blocks']]
    if timed is not network:
        rows = [row | {'measured': own['latency']} for row, own in zip(rows, timed['blocks'], strict=True)]
    columns = {key: name for key, name in columns.items() if any(row[key] is not None for row in rows)}
    names = [f'{row["stage"]}.{int(row["place"].split(".")[1]) + 1}' for row in rows]
    values = [[name, *(row[key] for key in columns)] for name, row in zip(names, rows, strict=True)]
    return _table(['block', *columns.values()], values)


def _summary(run: Run) -> str:
    done = 'finished' if run.of('end') else 'not finished'
    rows = [('task', run.header['task']), ('state', done), ('epochs', len(run.of('epoch')))]
    epochs = [line for line in run.of('epoch') if line.get('val')]
    if epochs and run.header['task'] == 'search':
        rows.append(('last validation, Gumbel paths', f'top-1 {epochs[-1]["val"]["top1"] or 0:.2f} %'))
    elif epochs:
        best = max(epochs, key=lambda line: line['val']['top1'] or 0)
        rows.append(('best top-1', f'{best["val"]["top1"]:.2f} % (epoch {best["epoch"]})'))
    if 'latency' in run.header:
        about = run.header['latency']
        given = f' ({about["given"]})' if str(about.get('given', '')).endswith('%') else ''
        rows.append(('target', f'{about["target"]:.4f} {about["unit"]}{given}'))
    if scaled := [line['latency'] for line in run.of('epoch') if line.get('latency')]:
        rows.append(('current architecture', f'{scaled[-1]["after"]:.4f} {run.header["latency"]["unit"]} by the table'))
        for name, limit in scaled[-1].get('limits', {}).items():
            unit = run.header['latency']['limits'][name]['unit']
            rows.append((f'limit {name}', f'{limit["after"]:.4f} of at most {limit["limit"]:.4f} {unit} by the table'))
    for line in run.of('latency'):
        rows.append(('measured latency', f'{line["ms"]:.4f} ms on {line["device"]}, batch {line["batch_size"]}'))
    return _table(('', ''), rows)


def _epochs(run: Run) -> str:
    rows = [_flat({key: line[key] for key in line if key not in SKIPPED}) for line in run.of('epoch')]
    names = list(dict.fromkeys(name for row in rows for name in row))
    about = run.header.get('latency', {})
    return _table([_with_unit(name, about) for name in names], [[row.get(name, '') for name in names] for row in rows])


def _with_unit(name: str, about: dict) -> str:
    """Return the name of an epoch's number with its unit, if it has one.

    Args:
        about: the header's description of the latency table, with the limits' tables.
    """
    if name.endswith(('top1', 'top5')):
        return f'{name} (%)'
    if name.endswith(' given_up'):
        return f'{name} (log-probability)'
    for limit, table in about.get('limits', {}).items():
        if name == f'mixture_{limit}' or name.startswith(f'latency limits {limit} '):
            return f'{name} ({table["unit"]})'
    return f'{name} ({about.get("unit", "ms")})' if 'latency' in name else name


SKIPPED = {'kind', 'time', 'ops', 'exits', 'widths', 'network'}


def _flat(values: dict, prefix: str = '') -> dict:
    found = {}
    for key, value in values.items():
        found |= _flat(value, f'{prefix}{key} ') if isinstance(value, dict) else {f'{prefix}{key}': value}
    return found


def _table(names, rows) -> str:
    def cell(value, tag: str = 'td') -> str:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        text = f'{value:.5g}' if isinstance(value, float) else '' if value is None else str(value)
        return f'<{tag} class="n">{text}</{tag}>' if number else f'<{tag}>{escape(text)}</{tag}>'

    numeric = [bool(rows) and isinstance(rows[0][i], (int, float)) for i in range(len(names))]
    head = ''.join(f'<th{" class=n" * is_n}>{escape(name)}</th>' for name, is_n in zip(names, numeric, strict=True))
    body = ''.join(f'<tr>{"".join(map(cell, row))}</tr>' for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
