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
from tools.report.compare import PUBLISHED, _epochs_figure, _macs_figure, compare_runs, results, results_text
from tools.report.draw import draw_at_end, draw_run
from tools.report.figures import STYLE, _collapsed, network_figure, operators_figure, training_figure, with_measured
from tools.report.page import _with_unit
from tools.run import METRICS, read_run


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
    assert Page((searched / 'report.html').read_text()).text.count('last validation, Gumbel paths') == 1
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


def test_a_picture_that_fails_is_a_line_of_the_log(tmp_path, caplog):
    (tmp_path / METRICS).write_text('{"kind":"run","version":1,"task":"search"}\n{"kind":"epoch","epoch":0}\n')
    draw_at_end(tmp_path)
    assert caplog.messages[-1].startswith('no pictures: KeyError')


def runs(tmp_path, **changes):
    made = []
    for i, ms in enumerate((15.0, 12.0, 10.0)):
        kept = {name: value[i] for name, value in changes.items()}
        made.append(read_run(write_training(tmp_path / f'run-{i}', **{'ms': ms, 'top1': 76.0 - i} | kept)))
    return made


def test_runs_compare_beside_published_networks(tmp_path, capsys):
    written = compare_runs(runs(tmp_path), tmp_path / 'out')
    assert [path.name for path in written] == [
        'epochs.png', 'epochs.svg', 'accuracy_multiply_adds.png', 'accuracy_multiply_adds.svg',
        'accuracy_latency.png', 'accuracy_latency.svg', 'results.csv', 'report.html',
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
        'run,task,target,predicted,unit,measured_ms,macs_m,params_m,best_top1_percent,minutes',
        'run-0,training,,,,15.0000,456.68,8.7575,76.00,0.0',
        'run-1,training,,,,,456.68,8.7575,75.00,0.0',
        'run-2,training,,,,10.2500,456.68,8.7575,74.00,0.0',
    ]
    (page,) = (tmp_path / 'out').glob('*.html')
    assert 'run-1' in Page(page.read_text()).text and page.read_text().count('<img') == 3


def test_latencies_of_different_settings_are_not_mixed(tmp_path, capsys):
    mixed = runs(tmp_path, device=['a', 'a', 'b'])
    with pytest.raises(BadInput, match='run-2 was measured with device b, run-0 with a'):
        compare_runs(mixed, tmp_path / 'out')
    assert not list((tmp_path / 'out').glob('*latency*'))
    compare_runs(runs(tmp_path / 'b', ms=[1.0, None, 2.0], classes=[10, 10, 10]), tmp_path / 'c')
    out = capsys.readouterr().out
    assert 'run-1: no measured latency' in out and 'published networks are left out' in out


def test_searches_compare_by_what_differs(searched, trained, tmp_path):
    longer = write_search(tmp_path / 'search-longer', epochs=8, seed=1)
    both = [read_run(searched), read_run(longer)]
    both[0].header['flags']['limit'], both[1].header['flags']['limit'] = [], ['params=4', 'macs=30%']
    assert [row[3] for row in results(both)[1]] == ['', 'params=4 macs=30%']
    both[1].header['flags']['limit'] = []
    names, rows = results(both)
    assert names[:3] == ['run', 'task', 'epochs'] and [row[2] for row in rows] == ['6', '8']
    last = both[1].of('epoch')[-1]
    row = dict(zip(names, rows[1], strict=True))
    assert row['target'] == f'{both[1].header["latency"]["target"]:.4f}' and row['unit'] == 'ms'
    assert float(row['predicted']) == pytest.approx(last['latency']['after'], abs=1e-4)
    assert row['macs_m'] == f'{last["network"]["macs"]:.2f}' and row['best_top1_percent'] == '43.75'
    with matplotlib.rc_context(STYLE):
        accuracy, latency = drawn(_epochs_figure([], both)).axes
    assert list(latency.lines[2].get_ydata()) == [line['latency']['after'] for line in both[1].of('epoch')[2:]]
    assert list(accuracy.lines[1].get_xdata()) == list(range(1, 9))
    text = results_text(names, rows).splitlines()
    assert len(text) == 3 and 'measured_ms' not in text[0] and len(set(map(len, text))) == 1
    written = compare_runs([read_run(trained), *both], tmp_path / 'out')
    assert {'epochs.png', 'accuracy_latency.png', 'results.csv'} <= {path.name for path in written}


def test_a_run_without_an_epoch_does_not_compare(searched, tmp_path):
    (tmp_path / METRICS).write_text((searched / METRICS).read_text().partition('\n')[0] + '\n')
    with pytest.raises(BadInput, match='has no epoch yet'):
        compare_runs([read_run(searched), read_run(tmp_path)], tmp_path)


def test_the_last_epochs_rate_is_drawn(trained):
    run = read_run(trained)
    with matplotlib.rc_context(STYLE):
        rates = drawn(training_figure(run)).axes[2].lines[0]
    assert list(rates.get_xdata()) == [0, 1, 2, 3, 4, 5]
    assert list(rates.get_ydata()) == [line['lr'] for line in run.of('epoch')] + [run.of('epoch')[-1]['lr']]


def test_equal_probabilities_have_the_middle_shade(searched):
    with matplotlib.rc_context(STYLE):
        image = drawn(operators_figure(read_run(searched))).subfigs[0].axes[0].images[0]
    assert float(image.norm(1 / 8)) == 0.5 and float(image.norm(0)) == 0
    assert abs(float(image.norm(1.04 / 8)) - 0.5) < 0.03  # nearly uniform is nearly the middle


def test_measured_latencies_fill_the_table_of_blocks(trained):
    run = read_run(trained)
    network = with_measured(run, run.header['network'])
    assert [row['latency'] for row in network['blocks']] == pytest.approx([0.8 * 7.5 / 18] * 18)
    assert network['latency'] == pytest.approx(7.5) and run.header['network']['latency'] is None
    draw_run(trained)
    text = Page((trained / 'report.html').read_text()).text.splitlines()
    assert {'measured latency (ms)', 'MACs (M)', 'input size (pixels)', 'val top1 (%)', 'stage1.1'} <= set(text)
    assert 'stage1.0' not in text and 'latency by the table (None)' not in text and text.count('0.33333') == 18


def test_numbers_of_epochs_have_their_units():
    about = {'unit': 'ms', 'limits': {'params': {'unit': 'M parameters'}}}
    units = {
        'val top1': '%',
        'latency after': 'ms',
        'latency given_up': 'log-probability',
        'latency limits params before': 'M parameters',
        'mixture_latency': 'ms',
        'mixture_params': 'M parameters',
    }
    assert [_with_unit(name, about) for name in units] == [f'{name} ({unit})' for name, unit in units.items()]
    assert _with_unit('w_loss', about) == 'w_loss' and _with_unit('latency after', {}) == 'latency after (ms)'


def test_long_titles_are_wrapped(trained):
    network = read_run(trained).header['network']
    with matplotlib.rc_context(STYLE):
        figure = drawn(network_figure(network, 'a title of a hundred characters ' * 8))
    box = figure._suptitle.get_window_extent()
    assert box.x1 <= figure.bbox.x1 and '\n' in figure._suptitle.get_text()


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
