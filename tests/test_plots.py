"""Pictures and reports from metrics.jsonl alone, and tables of runs."""

import csv
import json
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
from metrics_runs import write_search, write_training
from PIL import Image

from models.config import dump_config, load_config
from tools.errors import BadInput
from tools.figures import STYLE, collapsed_entropy, network_figure, operators_figure, training_figure, with_measured
from tools.plots import compare, draw_at_end, draw_run
from tools.run import METRICS, read_run


@pytest.fixture(scope='module')
def searched(tmp_path_factory):
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
    boxes = [(t.get_text(), matplotlib.text.Text.get_window_extent(t)) for t in texts]
    boxes = [(text, box) for text, box in boxes if box.width > 1]
    return [(a, b) for i, (a, x) in enumerate(boxes) for b, y in boxes[i + 1 :] if x.padded(-1).overlaps(y.padded(-1))]


class Page(HTMLParser):
    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.text, self.links = [], [], '', []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ('src', 'href')]
        if tag not in ('meta', 'img'):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data + '\n'


@pytest.mark.parametrize('kind', ['search', 'training'])
def test_a_run_gives_pictures_and_one_page_with_all_numbers(searched, trained, kind):
    folder = searched if kind == 'search' else trained
    names = ('network', 'search', 'operators', 'depth') if kind == 'search' else ('network', 'training')
    written = draw_run(folder)
    expected = {f'{name}.{suffix}' for name in names for suffix in ('png', 'svg')}
    assert {path.name for path in written} == expected | {'report.html'}
    for path in (folder / 'plots').glob('*.png'):
        pixels = np.asarray(Image.open(path).convert('L'))
        assert pixels.shape[1] >= 1000 and pixels.std() > 20
    page, run = Page(folder / 'report.html'), read_run(folder)
    assert page.open == [] and page.tags.count('img') == len(names)
    assert all(link.startswith('data:image/svg+xml;base64,') for link in page.links)
    values = [value for value in run.header['flags'].values() if not isinstance(value, float)]
    assert all(str(value) in page.text for value in values)  # also '<made> & "up"', which has to be escaped


def test_no_labels_overlap_at_18_blocks_or_few(trained, searched):
    network = read_run(trained).header['network']
    short = network | {'blocks': network['blocks'][::3], 'latency': 9.0, 'unit': 'ms'}
    short['blocks'] = [row | {'latency': 1.0} for row in short['blocks']]
    with matplotlib.rc_context(STYLE):
        for figure in (
            network_figure(network, 'title'),
            network_figure(short, 'a title of a hundred characters ' * 8),
            operators_figure(read_run(searched)),
        ):
            assert overlapping(drawn(figure)) == []
            title = figure._suptitle
            assert title is None or title.get_window_extent().x1 <= figure.bbox.x1


def test_the_network_picture_shows_the_networks_numbers(trained):
    network = read_run(trained).header['network']
    with matplotlib.rc_context(STYLE):
        widths, layers, costs = drawn(network_figure(network, 'title')).axes
    texts = [text.get_text() for text in widths.texts]
    assert [text for text in texts if text.isdigit()] == [str(row['mid']) for row in network['blocks']]
    heights = [bar.get_height() for bar in costs.containers[0]]
    shares = [100 * row['macs'] / network['macs'] for row in network['blocks']]
    assert heights[:18] == pytest.approx(shares) and sum(heights) == pytest.approx(100)
    kernels = [f'{row["kernel"]}×{row["kernel"]}' for row in network['blocks']]
    assert [text.get_text() for text in layers.texts][::4] == kernels


def test_measured_latencies_take_the_place_of_the_tables(trained):
    run = read_run(trained)
    network = with_measured(run, run.header['network'])
    assert [row['latency'] for row in network['blocks']] == pytest.approx([0.8 * 7.5 / 18] * 18)
    assert network['latency'] == pytest.approx(7.5) and run.header['network']['latency'] is None


def test_probabilities_entropy_and_rates_are_drawn_as_they_are(searched, trained):
    search, training = read_run(searched), read_run(trained)
    with matplotlib.rc_context(STYLE):
        operators, rates = drawn(operators_figure(search)), drawn(training_figure(training)).axes[2].lines[0]
    image = operators.subfigs[0].axes[0].images[0]
    assert image.get_array()[:, -1].tolist() == pytest.approx(search.of('epoch')[-1]['ops'][0])
    assert float(image.norm(1 / 8)) == 0.5 and float(image.norm(0)) == 0  # equal probabilities have the middle shade
    (entropy,) = operators.subfigs[1].axes
    assert entropy.lines[0].get_ydata()[0] == pytest.approx(1)  # of the warm-up
    assert collapsed_entropy(1 / 8, 8) == pytest.approx(1) and collapsed_entropy(0.9, 8) < collapsed_entropy(0.5, 8) < 1
    lines = training.of('epoch')
    assert list(rates.get_ydata()) == [line['lr'] for line in lines] + [lines[-1]['lr']]


def test_a_small_space_and_a_single_epoch_can_be_drawn(tmp_path, small_space):
    write_search(tmp_path, small_space, epochs=1, warmup=0)
    assert len(draw_run(tmp_path)) == 9
    with open(tmp_path / METRICS) as f:
        header = f.readline()
    (tmp_path / METRICS).write_text(header)  # a run that has done nothing yet
    assert [path.name for path in draw_run(tmp_path)] == ['report.html']


def test_a_picture_that_fails_is_only_logged(tmp_path, caplog):
    (tmp_path / METRICS).write_text('{"kind":"run","version":1,"task":"search"}\n{"kind":"epoch","epoch":0}\n')
    draw_at_end(tmp_path)
    assert 'KeyError' in caplog.messages[-1]


def test_runs_are_compared_in_a_table(searched, tmp_path, run_script):
    """Two trainings, one of them of a config that was fitted to a target; and a search."""
    folders = [
        write_training(tmp_path / name, ms=ms, top1=top1) for name, ms, top1 in (('a', None, 76.0), ('b', 9, 75))
    ]
    config = json.loads(dump_config(load_config('models/zoo/tf_nas_a.config')))
    config['meta'] = {'target': 8.0, 'predicted': 7.9, 'unit': 'ms', 'measured': 8.4}
    (folders[0] / 'model.config').write_text(json.dumps(config))
    run_script('-m', 'tools.plots', *folders, searched, '--out', tmp_path / 'out')
    a, b, search = csv.DictReader((tmp_path / 'out' / 'results.csv').open())
    assert (a['target'], a['predicted'], a['measured_ms'], a['off_percent']) == ('8', '7.9', '8.4', '5')
    assert (a['macs_m'], a['params_m'], a['top1_percent'], b['top1_percent']) == ('456.68', '8.7575', '76', '75')
    assert (b['target'], b['measured_ms'], search['task']) == ('', '9', 'search')
    last = read_run(searched).of('epoch')[-1]
    assert float(search['predicted']) == pytest.approx(last['latency']['after'], rel=1e-4)
    assert a['epochs'] == '5' and search['epochs'] == '6'  # a flag that differs
    assert {'eval', '456.68'} & set(Page(tmp_path / 'out' / 'report.html').text.split())


def test_a_run_that_is_absent_or_has_no_epoch_is_refused(searched, tmp_path):
    (tmp_path / METRICS).write_text((searched / METRICS).read_text().partition('\n')[0] + '\n')
    for path in (tmp_path, tmp_path / 'absent'):
        with pytest.raises(BadInput, match=path.name):
            compare([searched, path], tmp_path / 'out')
