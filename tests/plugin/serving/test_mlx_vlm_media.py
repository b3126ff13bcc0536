"""Keys of conversations with pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from mlx_kvcache.plugin.serving.mlx_vlm_media import Request, request_of

MARK = 900
TOKENS = [1, 2, MARK, MARK, 3, MARK, MARK, 4]


def key(inputs: Mapping[str, Any], tokens: list[int] = TOKENS) -> Request:
    return request_of(tokens, inputs, {MARK})


def noise(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def test_each_picture_has_its_number() -> None:
    one, two = noise(3, 8, 8, seed=1), noise(3, 8, 8, seed=2)
    both, turned = key({"pixel_values": mx.stack([one, two])}), key({"pixel_values": mx.stack([two, one])})
    assert both.key[2] == both.key[3] != both.key[5]
    assert (both.key[2], both.key[5]) == (turned.key[5], turned.key[2])
    assert [both.key[i] for i in (0, 1, 4, 7)] == [1, 2, 3, 4]
    assert all(1 << 62 <= both.key[i] < 1 << 63 for i in (2, 3, 5, 6))
    # The first picture alone has the same number, so that the next turn may bring another.
    alone = key({"pixel_values": one[None]}, TOKENS[:5])
    assert alone.key == both.key[:5]


def test_equal_patches_in_another_layout_are_another_picture() -> None:
    patches = mx.ones((16, 12))
    wide, high = (
        key({"pixel_values": patches, "image_grid_thw": mx.array([grid])}, TOKENS[:5])
        for grid in ([1, 2, 8], [1, 4, 4])
    )
    assert wide.key[2] != high.key[2]


def test_where_rows_and_pictures_do_not_match_all_pictures_count() -> None:
    """Such as tiles, of which each picture has any number."""
    sized = [key({"pixel_values": noise(2, 3, 8, 8), "image_sizes": [[8, n]] * 2}).key[2] for n in (6, 8)]
    assert sized[0] != sized[1]
    tiles = noise(5, 3, 8, 8)
    one, other = key({"pixel_values": tiles}), key({"pixel_values": mx.concatenate([tiles[:4], tiles[:1]])})
    assert one.key[2] == one.key[5] != other.key[2]
    assert one.key[:2] == other.key[:2]


def test_a_picture_that_is_not_known_ends_the_key() -> None:
    for inputs in ({}, {"tiles_of_pictures": noise(2, 4)}, {"pixel_values": None}):
        assert key(inputs).key == (1, 2)
    request = key({})
    assert request.keys([*TOKENS, 5]) == [1, 2]


def test_media_without_a_place_are_in_the_salt() -> None:
    text = key({}, [1, 2, 3])
    sounds = [key({"input_features": noise(1, 4, 6, seed=seed)}, [1, 2, 3]) for seed in (1, 2)]
    # A model whose placeholders are not known.
    picture = key({"pixel_values": noise(1, 3, 8, 8)}, [1, 2, 3])
    assert len({request.salt for request in (text, *sounds, picture)}) == 4
    assert {request.key for request in (text, *sounds, picture)} == {(1, 2, 3)}


def test_inputs_with_a_number_for_each_token_are_no_media() -> None:
    inputs = {"attention_mask": mx.ones((1, 3)), "kinds": mx.zeros((1, 3), mx.int32)}
    assert key(inputs, [1, 2, 3]) == key({}, [1, 2, 3])
    assert key({"sound": mx.zeros((1, 3))}, [1, 2, 3]) != key({}, [1, 2, 3])


def test_replies_keep_their_tokens() -> None:
    request = key({"pixel_values": noise(2, 3, 8, 8)})
    assert request.keys([*TOKENS, 7, MARK]) == [*request.key, 7, MARK]
    assert request.keys(TOKENS[:3]) == list(request.key[:3])
    assert request.keys([9, *TOKENS]) is None


def test_negative_tokens_are_numbers_that_files_hold() -> None:
    request = key({}, [1, -1, -2, 3])
    assert request.key == (1, (1 << 62) - 1, (1 << 62) - 2, 3)


def test_positions_inside_a_picture() -> None:
    request = key({"pixel_values": noise(2, 3, 8, 8)})
    assert [request.before(position) for position in range(9)] == [0, 1, 2, 2, 4, 5, 5, 7, 8]
    assert [request.is_text(position) for position in (0, 6, 7, 8)] == [False, False, True, True]
