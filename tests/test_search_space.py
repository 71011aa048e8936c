"""The table and what is derived from it."""

from models.search_space import SPACE

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


def test_operators_stand_in_the_order_of_checkpoints():
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


def test_stage_input_is_an_exit_only_where_shapes_allow(small_space):
    assert not any(stage.input_is_exit for stage in SPACE.stages)
    assert [list(stage.exit_depths) for stage in small_space.stages] == [[1], [0, 1, 2], [1, 2]]
