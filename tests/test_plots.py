"""Pictures and reports from metrics.jsonl alone, and comparisons of runs."""

import re
import shutil
import sys
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
from metrics_runs import write_search, write_training
from PIL import Image

from tools import options, plots
from tools.errors import BadInput
from tools.report.compare import PUBLISHED, _macs_figure, compare_runs
from tools.report.draw import draw_at_end, draw_run
from tools.report.figures import STYLE, _collapsed, network_figure, operators_figure
from tools.run.metrics import METRICS, read_run


@pytest.fixture(scope='module')
def searched(tmp_path_factory, request):
    return write_search(tmp_path_factory.mktemp('runs') / 'search-made-up')


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    return write_training(tmp_path_factory.mktemp('runs') / 'eval-made-up')


def drawn(figure):
    figure.draw_without_rendering()
    return figure


def overlapping(figure):
    """Pairs of visible texts of a figure whose boxes overlap."""
    texts = [t for t in figure.findobj(matplotlib.text.Text) if t.get_visible() and t.get_text().strip()]
    texts = [t for t in texts if t.axes is None or t.axes.get_visible()]
    boxes = [(t.get_text(), matplotlib.text.Text.get_window_extent(t)) for t in texts]  # without the line of a name
    boxes = [(text, box) for text, box in boxes if box.width > 1]
    return [(a, b) for i, (a, x) in enumerate(boxes) for b, y in boxes[i + 1 :] if x.padded(-1).overlaps(y.padded(-1))]


def test_a_search_gives_four_pictures_and_a_report(searched, tmp_path):
    shutil.copy(searched / METRICS, tmp_path / METRICS)  # nothing but the file
    written = draw_run(tmp_path)
    names = {f'{name}.{kind}' for name in ('network', 'search', 'operators', 'depth') for kind in ('png', 'svg')}
    assert {path.name for path in written} == names | {'report.html'}
    for path in (tmp_path / 'plots').glob('*.png'):
        pixels = np.asarray(Image.open(path).convert('L'))
        assert pixels.shape[1] >= 1200 and pixels.std() > 20
    before = {path.name: path.read_bytes() for path in written if path.suffix == '.png'}
    assert before == {path.name: path.read_bytes() for path in draw_run(tmp_path) if path.suffix == '.png'}


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text, self.links = [], [], '', []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ('src', 'href')]
        if tag not in ('meta', 'img'):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data + '\n'


def test_the_report_is_one_file_with_all_numbers(searched, trained):
    for folder, pictures in ((searched, 4), (trained, 2)):
        draw_run(folder)
        page = Page((folder / 'report.html').read_text())
        assert page.open == [] and page.tags.count('img') == pictures
        assert all(link.startswith('data:image/svg+xml;base64,') for link in page.links)
        run = read_run(folder)
        assert all(str(value) in page.text for value in run.header['flags'].values() if not isinstance(value, float))
        assert run.header['environment']['torch'] in page.text and 'finished' in page.text
    assert '<made> & "up"' in Page((searched / 'report.html').read_text()).text  # escaped
    assert '7.5 ms on made-up device, batch 1' in page.text.replace('7.5000', '7.5')


def test_no_labels_overlap_at_18_blocks_or_few(trained, searched):
    with matplotlib.rc_context(STYLE):
        network = read_run(trained).header['network']
        assert len(network['blocks']) == 18
        assert overlapping(drawn(network_figure(network, 'title'))) == []
        short = network | {'blocks': network['blocks'][::3], 'latency': 9.0, 'unit': 'ms'}
        short['blocks'] = [row | {'latency': 1.0} for row in short['blocks']]
        assert overlapping(drawn(network_figure(short, 'a title of a hundred characters ' * 3))) == []
        assert overlapping(drawn(operators_figure(read_run(searched)))) == []


def test_the_network_picture_shows_the_networks_numbers(trained):
    network = read_run(trained).header['network']
    with matplotlib.rc_context(STYLE):
        widths, layers, costs = drawn(network_figure(network, 'title')).axes
    texts = [text.get_text() for text in widths.texts]
    assert [text for text in texts if text.isdigit()] == [str(row['mid']) for row in network['blocks']]
    heights = [bar.get_height() for bar in costs.containers[0]]
    shares = [100 * row['macs'] / network['macs'] for row in network['blocks']]
    assert heights[:18] == pytest.approx(shares) and sum(heights) == pytest.approx(100)
    cells = [patch for patch in layers.patches if patch.get_width() < 0.2]
    assert len(cells) == sum(row['kernel'] ** 2 for row in network['blocks'])


def test_a_small_space_and_a_single_epoch_can_be_drawn(tmp_path, small_space):
    write_search(tmp_path, small_space, epochs=1, warmup=0)
    assert len(draw_run(tmp_path)) == 9
    with open(tmp_path / METRICS) as f:
        header = f.readline()
    (tmp_path / METRICS).write_text(header)  # a run that has done nothing yet
    assert [path.name for path in draw_run(tmp_path)] == ['report.html']


def test_entropy_marks(searched):
    assert _collapsed(1 / 8, 8) == pytest.approx(1) and 0 < _collapsed(0.9, 8) < _collapsed(0.5, 8) < 1


def test_a_picture_that_fails_is_a_line_of_the_log(tmp_path):
    lines = []
    (tmp_path / METRICS).write_text('{"kind":"run","version":1,"task":"search"}\n{"kind":"epoch","epoch":0}\n')
    draw_at_end(tmp_path, lambda text, *values: lines.append(text % values))
    assert lines[0].startswith('drawing') and lines[1].startswith('no pictures: KeyError') and len(lines) == 2


def runs(tmp_path, **changes):
    made = []
    for i, ms in enumerate((15.0, 12.0, 10.0)):
        kept = {name: value[i] for name, value in changes.items()}
        made.append(read_run(write_training(tmp_path / f'run-{i}', **{'ms': ms, 'top1': 76.0 - i} | kept)))
    return made


def test_runs_compare_beside_published_networks(tmp_path, capsys):
    written = compare_runs(runs(tmp_path), tmp_path / 'out')
    assert [path.name for path in written] == [
        'accuracy_multiply_adds.png', 'accuracy_multiply_adds.svg', 'accuracy_latency.png', 'accuracy_latency.svg',
        'results.csv',
    ]  # fmt: skip
    assert capsys.readouterr().out == ''
    with matplotlib.rc_context(STYLE):
        figure = drawn(_macs_figure(runs(tmp_path)))
    (axis,) = figure.axes
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels[3:] == ['1: run-0', '2: run-1', '3: run-2'] and labels[0].startswith('TF-NAS (paper): A, B, C, D, ')
    assert all('(published)' in label for label in labels[:3]) and 'distilled' in labels[2]
    x, y = (axis.lines[4].get_xdata(), axis.lines[4].get_ydata())
    assert (axis.texts[1].get_text(), x[0], y[0]) == ('2', pytest.approx(456.68, abs=0.01), 75.0)
    assert [list(axis.lines[1].get_xdata()), list(axis.lines[1].get_ydata())] == [[378, 236, 419], [75.2, 75.5, 77.7]]
    legend = {text.get_text() for text in axis.get_legend().get_texts()}
    assert [pair for pair in overlapping(figure) if legend & set(pair)] == []


def test_results_are_tabulated(tmp_path):
    compare_runs(runs(tmp_path, ms=[15.0, None, 10.25]), tmp_path / 'out')
    assert (tmp_path / 'out' / 'results.csv').read_text().splitlines() == [
        'run,macs_m,params_m,best_top1_percent,measured_ms',
        'run-0,456.68,8.7575,76.00,15.0000',
        'run-1,456.68,8.7575,75.00,',
        'run-2,456.68,8.7575,74.00,10.2500',
    ]


def test_latencies_of_different_settings_are_not_mixed(tmp_path, capsys):
    mixed = runs(tmp_path, device=['a', 'a', 'b'])
    with pytest.raises(BadInput, match='run-2 was measured with device b, run-0 with a'):
        compare_runs(mixed, tmp_path / 'out')
    assert not list((tmp_path / 'out').glob('*latency*'))
    compare_runs(runs(tmp_path / 'b', ms=[1.0, None, 2.0], classes=[10, 10, 10]), tmp_path / 'c')
    out = capsys.readouterr().out
    assert 'run-1: no measured latency' in out and 'published networks are left out' in out


def test_only_trainings_compare(searched, trained, tmp_path):
    with pytest.raises(BadInput, match='search-made-up: comparing needs trainings'):
        compare_runs([read_run(trained), read_run(searched)], tmp_path)


def test_published_numbers_are_all_there():
    assert sum(len(points) for _, _, points in PUBLISHED) == 12


def test_the_command_draws_and_refuses(trained, tmp_path, run_script, monkeypatch, capsys):
    out = run_script('-m', 'tools.plots', trained, '--out', tmp_path).stdout
    assert re.findall(r'(\w+)\.svg', out) == ['network', 'training'] and (tmp_path / 'report.html').exists()
    monkeypatch.setattr(sys, 'argv', ['tools.plots', str(tmp_path / 'absent')])
    with pytest.raises(SystemExit) as ended:
        options.run_script(plots.main, plots.get_args())
    error = capsys.readouterr().err
    assert ended.value.code == 2 and len(error.splitlines()) == 1
    assert 'expected a run folder with metrics.jsonl' in error
