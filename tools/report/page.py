"""`report.html`: pictures, tables, flags and environment of a run in one file that needs no server."""

import base64
from html import escape

from tools.run.metrics import Run

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
        names = ('place', 'kernel', 'stride', 'size', 'in', 'mid', 'out', 'se', 'act', 'macs', 'latency')
        parts += ['<h2>Blocks</h2>', _table(names, [[row[name] for name in names] for row in network['blocks']])]
    parts += ['<h2>Epochs</h2>', _epochs(run)]
    for title, values in (('Flags', run.header['flags']), ('Environment', run.header['environment'])):
        parts += [f'<h2>{title}</h2>', _table(('name', 'value'), list(values.items()))]
    head = f'<meta charset="utf-8"><title>{escape(run.name)}</title><style>{CSS}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def _summary(run: Run) -> str:
    done = 'finished' if run.of('end') else 'not finished'
    rows = [('task', run.header['task']), ('state', done), ('epochs', len(run.of('epoch')))]
    if epochs := [line for line in run.of('epoch') if line.get('val')]:
        best = max(epochs, key=lambda line: line['val']['top1'] or 0)
        rows.append(('best top-1', f'{best["val"]["top1"]:.2f} % (epoch {best["epoch"]})'))
    if 'latency' in run.header:
        rows.append(('target', f'{run.header["latency"]["target"]:.4f} {run.header["latency"]["unit"]}'))
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
    return _table(names, [[row.get(name, '') for name in names] for row in rows])


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
