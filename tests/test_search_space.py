"""The table and what is derived from it."""

import subprocess
import sys
from dataclasses import replace

import pytest

from conftest import ROOT, SMALL_SPACE
from models import functions
from models.search_space import ACTIVATIONS, SPACE, Op

SHAPES = """112_16_{}_24_k{}_s2_relu 56_24_{}_24_k{}_s1_relu 56_24_{}_40_k{}_s2_swish 28_40_{}_40_k{}_s1_swish
28_40_{}_80_k{}_s2_swish 14_80_{}_80_k{}_s1_swish 14_80_{}_112_k{}_s1_swish 14_112_{}_112_k{}_s1_swish
14_112_{}_192_k{}_s2_swish 7_192_{}_192_k{}_s1_swish 7_192_{}_320_k{}_s1_swish""".split()


def test_keys_are_the_66_of_the_published_tables():
    expected = set()
    for shape in SHAPES:
        in_ch = int(shape.split('_')[1])
        for se_ch in (0, in_ch, 2 * in_ch):
            for kernel in (3, 5):
                expected.add('MBInvertedResBlock_' + shape.format(se_ch, kernel))
    widths = SPACE.table_widths()
    assert len(expected) == 66
    assert set(widths) == expected
    # a key without SE serves e3 and e6 (8 * in channels), with SE it serves one of them
    assert widths['MBInvertedResBlock_14_80_0_112_k5_s1_swish'] == (160, 640)
    assert widths['MBInvertedResBlock_14_80_80_112_k5_s1_swish'] == (160, 320)
    assert widths['MBInvertedResBlock_14_80_160_112_k5_s1_swish'] == (320, 640)
    assert sum(high for _, high in widths.values()) == 36480


def test_operators_have_the_order_of_checkpoints():
    rows = [(op.kernel, op.expand, op.se) for op in SPACE.ops]
    assert rows == [
        (3, 3, False), (3, 6, False), (5, 3, False), (5, 6, False),
        (3, 3, True), (3, 6, True), (5, 3, True), (5, 6, True),
    ]  # fmt: skip


def test_widths_start_at_expansion_and_range_from_half_to_four_thirds():
    start, most = SPACE.start_widths(), SPACE.max_widths()
    assert start['stage3']['block1'] == {0: 120, 1: 240, 2: 120, 3: 240, 4: 120, 5: 240, 6: 120, 7: 240}
    assert most['stage3']['block2'] == {0: 320, 1: 640, 2: 320, 3: 640, 4: 320, 5: 640, 6: 320, 7: 640}
    assert SPACE.ops[5].min_width(40) == 160
    assert SPACE.ops[4].se_width(40) == 40 and SPACE.ops[5].se_width(40) == 80 and SPACE.ops[1].se_width(40) == 0


def test_sizes_follow_strides_at_any_input_size():
    at_224 = [(b.stage, b.in_size, b.stride) for b in SPACE.blocks(224) if b.name == 'block1']
    assert at_224 == [
        ('stage1', 112, 2), ('stage2', 56, 2), ('stage3', 28, 2),
        ('stage4', 14, 1), ('stage5', 14, 2), ('stage6', 7, 1),
    ]  # fmt: skip
    assert [b.in_size for b in SPACE.blocks(65) if b.name == 'block1'] == [33, 17, 9, 5, 5, 3]


def test_stage_input_is_an_exit_only_if_shapes_allow(small_space):
    assert not any(stage.input_is_exit for stage in SPACE.stages)
    assert [list(stage.exit_depths) for stage in small_space.stages] == [[1], [0, 1, 2], [1, 2]]


def changed(rows, index, **values):
    """`SMALL_SPACE` with other values in one row, of a tuple if `index` is a number."""
    old = getattr(SMALL_SPACE, rows)
    new = replace(old, **values) if index is None else (*old[:index], replace(old[index], **values), *old[index + 1 :])
    return replace(SMALL_SPACE, **{rows: new})


@pytest.mark.parametrize(
    ('rows', 'index', 'values', 'message'),
    [
        ('stages', 1, {'act': 'gelu'}, "stages[1].act is 'gelu', should be one of relu, relu6, swish, h-swish"),
        ('stages', 0, {'act': None}, 'stages[0].act is None, should be one of relu'),
        ('stem', None, {'act': 'Relu'}, "stem.act is 'Relu', should be"),
        ('head', None, {'act': 'hswish'}, "head.act is 'hswish', should be"),
        ('ops', 2, {'kernel': 4}, 'ops[2].kernel is 4, should be an odd whole number from 1 to 31'),
        ('ops', 0, {'kernel': 33}, 'ops[0].kernel is 33, should be'),
        ('stem', None, {'kernel': 2}, 'stem.kernel is 2, should be'),
        ('ops', 1, {'expand': 0}, 'ops[1].expand is 0, should be a whole number of at least 1'),
        ('ops', 1, {'expand': 1.5}, 'ops[1].expand is 1.5, should be a whole number of at least 1'),
        ('ops', 1, {'expand': 1}, 'ops[1].expand is 1: with 4 input channels, its least width of 2 should be above 4'),
        ('ops', 1, {'se': 'yes'}, "ops[1].se is 'yes', should be True or False"),
        ('stages', 2, {'depth': 0}, 'stages[2].depth is 0, should be a whole number of at least 1'),
        ('stages', 2, {'depth': True}, 'stages[2].depth is True, should be'),
        ('stages', 2, {'stride': 3}, 'stages[2].stride is 3, should be 1 or 2'),
        ('stem', None, {'stride': 0}, 'stem.stride is 0, should be 1 or 2'),
        ('stages', 0, {'in_ch': 5}, 'stages[0].in_ch is 5, should be 4, as stem.out_ch'),
        ('stages', 1, {'out_ch': 7}, 'stages[2].in_ch is 6, should be 7, as stages[1].out_ch'),
        ('stem', None, {'out_ch': 8}, 'stages[0].in_ch is 4, should be 8, as stem.out_ch'),
        ('stages', 2, {'out_ch': 0}, 'stages[2].out_ch is 0, should be'),
        ('stem', None, {'se_ch': -1}, 'stem.se_ch is -1, should be a whole number of at least 0'),
        ('head', None, {'out_ch': '16'}, "head.out_ch is '16', should be"),
    ],
)
def test_rows_that_cannot_be_are_named(rows, index, values, message):
    with pytest.raises(ValueError) as error:
        changed(rows, index, **values)
    assert message in str(error.value)


@pytest.mark.parametrize('rows', ['ops', 'stages'])
def test_a_space_has_rows(rows):
    with pytest.raises(ValueError, match=f'{rows} is empty'):
        replace(SMALL_SPACE, **{rows: ()})


def test_rows_at_the_bounds_can_be():
    space = changed('stem', None, se_ch=0, stride=1)
    space = replace(space, ops=(Op(1, 2, True), Op(31, 2, False)))
    assert all(op.min_width(block.in_ch) > block.in_ch for block, _, op in space.positions())


def test_every_activation_of_the_list_is_there():
    assert {None, *ACTIVATIONS} == functions.ACTIVATIONS.keys()


def test_the_search_space_needs_no_torch():
    code = "import runpy, sys; runpy.run_path('models/search_space.py'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == 0
