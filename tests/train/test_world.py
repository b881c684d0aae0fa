import itertools

import numpy as np
import pytest

from context_forcing.model.codecs.demo_text import WORDS, canonical_words
from context_forcing.train.world.background import background
from context_forcing.train.world.camera import headings, render_latent_frames, view
from context_forcing.train.world.geometry import (
    CHUNK,
    LANDMARK,
    LANDMARK_COLUMNS,
    LANDMARK_TOP,
    NUM_STATIONS,
    RING_COLUMNS,
    RING_WIDTH,
    STATION_COLUMNS,
    TOKEN,
    VIEW_COLUMNS,
    stations_in_view,
)
from context_forcing.train.world.prompts import ALL_STYLES, Style, caption
from context_forcing.train.world.scene import Scene, panorama, templates
from context_forcing.train.world.scripts import benchmark_script, pacing_script, random_script, random_styles
from context_forcing.train.world.sprites import NUM_CLASSES

DAY, NIGHT = Style(), Style(ground="snow", weather="cloudy", time="night")
FILLER = {"a", "under", "sky", "by", "at", "the", "camera", "field"}


def make_scene(seed=0):
    return Scene.sample(np.random.default_rng(seed))


def stations_touched(heading):
    """Stations of which any column is in view."""
    in_view = {(heading + column) % RING_COLUMNS for column in range(VIEW_COLUMNS)}
    first = {station: station * STATION_COLUMNS for station in range(NUM_STATIONS)}
    return {s for s in first if in_view & set(range(first[s], first[s] + LANDMARK_COLUMNS))}


def test_scripts_of_a_single_chunk():
    rng = np.random.default_rng(0)
    assert all(len(make(rng, 1)) == 1 for make in (random_script, pacing_script) for _ in range(50))


def test_headings_ignore_the_first_move_and_add_up_the_rest():
    assert headings([1, 1, 1, 0, -1, -1, -1], 1).tolist() == [0, 1, 2, 2, 1, 0, -1]
    assert headings([1, 1, 1, 0, -1, -1, -1], 1, start=5).tolist() == [5, 6, 7, 7, 6, 5, 4]
    assert headings([1, -1, 0], 2).tolist() == [0, 1, 0, -1, -1, -1]


def test_a_start_heading_turns_the_whole_clip():
    scene, moves = make_scene(), [0, 1, 1, -1, 0, 0]
    shifted, clip = (render_latent_frames(scene, [DAY] * 6, moves, 2, start) for start in (3, 0))
    np.testing.assert_array_equal(shifted[0], view(panorama(scene, DAY), 3 * TOKEN))
    np.testing.assert_array_equal(shifted[:, :, : -3 * TOKEN], clip[:, :, 3 * TOKEN :])


@pytest.mark.parametrize("move", [-1, 1])
def test_latent_frames_shift_by_one_token_column_per_move(move):
    frames = render_latent_frames(make_scene(), [DAY] * 4, [move] * 4)
    assert frames.shape == (12, 32, 64, 3) and frames.dtype == np.uint8
    for earlier, later in itertools.pairwise(frames):
        left, right = (earlier, later) if move > 0 else (later, earlier)
        np.testing.assert_array_equal(left[:, TOKEN:], right[:, :-TOKEN])


def test_a_turn_around_the_ring_ends_where_it_began():
    frames = render_latent_frames(make_scene(), [DAY] * 17, [0] + [1] * (RING_COLUMNS // CHUNK))
    np.testing.assert_array_equal(frames[2], frames[-1])
    pano = panorama(make_scene(), DAY)
    np.testing.assert_array_equal(view(pano, -TOKEN), view(pano, RING_WIDTH - TOKEN))
    np.testing.assert_array_equal(view(pano, RING_WIDTH - 8)[:, 8:], pano[:, :56])


def test_styles_switch_with_their_chunk():
    scene, moves = make_scene(5), random_script(np.random.default_rng(5), 5)
    styles = [DAY, DAY, NIGHT, NIGHT, DAY]
    frames = render_latent_frames(scene, styles, moves)
    for i, heading in enumerate(headings(moves)):
        np.testing.assert_array_equal(frames[i], view(panorama(scene, styles[i // CHUNK]), heading * TOKEN))


def test_a_seed_fixes_everything():
    def draw(seed):
        rng = np.random.default_rng(seed)
        return Scene.sample(rng), random_script(rng, 12), random_styles(rng, 12)

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)
    np.testing.assert_array_equal(panorama(make_scene(2), NIGHT), panorama(make_scene(2), NIGHT))


def test_neighbours_are_never_of_one_class():
    for seed in range(50):
        class_ids = np.array(make_scene(seed).class_ids)
        assert (class_ids != np.roll(class_ids, 1)).all() and class_ids.max() < NUM_CLASSES


def test_scenes_differ_only_in_their_landmarks():
    one, other = panorama(make_scene(0), DAY), panorama(make_scene(1), DAY)
    free = np.ones(one.shape[:2], dtype=bool)
    for station in range(NUM_STATIONS):
        left = station * STATION_COLUMNS * TOKEN
        free[LANDMARK_TOP : LANDMARK_TOP + LANDMARK, left : left + LANDMARK] = False
    np.testing.assert_array_equal(one[free], other[free])
    assert (one[~free] != other[~free]).any()


def test_every_heading_has_a_background_of_its_own():
    for style in ALL_STYLES:
        views = np.stack([view(background(style), TOKEN * heading) for heading in range(RING_COLUMNS)])
        distance = np.abs(views[:, None, :8] - views[None, :, :8]).mean(axis=(2, 3, 4))
        assert distance[~np.eye(RING_COLUMNS, dtype=bool)].min() > 0.5


def test_landmarks_in_view_are_where_they_are_drawn():
    scene = make_scene(7)
    for heading in range(-RING_COLUMNS, 2 * RING_COLUMNS):
        picture = view(panorama(scene, DAY), heading * TOKEN)
        landmarks = stations_in_view(heading)
        assert 2 <= len(landmarks) <= 3
        for station, column in landmarks:
            crop = picture[LANDMARK_TOP : LANDMARK_TOP + LANDMARK, column * TOKEN : column * TOKEN + LANDMARK]
            np.testing.assert_array_equal(crop, templates(DAY, station)[scene.class_ids[station]])


def test_classes_stay_apart_in_every_style_even_when_averaged_over_four_pixels():
    for style in ALL_STYLES:
        for station in (0, 8):
            crops = templates(style, station).astype(np.float64)
            assert crops.shape == (NUM_CLASSES, LANDMARK, LANDMARK, 3)
            coarse = crops.reshape(NUM_CLASSES, 4, 4, 4, 4, 3).mean(axis=(2, 4))
            distance = np.sqrt(((coarse[:, None] - coarse[None]) ** 2).mean(axis=(2, 3, 4)))
            assert distance[~np.eye(NUM_CLASSES, dtype=bool)].min() > 10


def test_captions_are_made_of_known_words_and_all_differ():
    captions = {caption(style, move) for style in ALL_STYLES for move in (-1, 0, 1)}
    assert len({tuple(canonical_words(text)) for text in captions}) == 3 * len(ALL_STYLES)
    for text in captions:
        assert set(text.lower().replace(".", "").split()) - FILLER <= set(WORDS)


@pytest.mark.parametrize(
    "text, style, move",
    [
        ("Wintry, misty, sunset. Panning leftwards", {"ground": "snow", "weather": "foggy", "time": "dusk"}, -1),
        ("a grassy field, overcast at NOON, the camera moves right", {"weather": "cloudy"}, 1),
        ("sand dunes in the nighttime, sunny, static camera", {"ground": "desert", "time": "night"}, 0),
    ],
)
def test_synonyms_reach_the_encoder_as_the_words_of_the_caption(text, style, move):
    assert set(canonical_words(text)) == set(canonical_words(caption(Style(**style), move)))
    assert all(concept in WORDS for concept in WORDS.values())


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("kind, gap", [("dwell", 0), ("dwell", 5), ("wander", 4), ("wander", 28)])
def test_benchmark_scripts_return_exactly_and_hide_the_targets_between(kind, gap, mirror):
    script = benchmark_script(kind, gap, mirror)
    path = headings(script.moves)
    assert script.headings == tuple(path) and len(path) == len(script.moves) * CHUNK
    assert (path[script.return_frame :] == script.target_heading).all()
    assert path[script.target_frame] == script.target_heading == (-6 if mirror else 6)
    targets = stations_touched(script.target_heading)
    assert len(stations_in_view(script.target_heading)) == 3
    for frame in script.hidden_frames:
        assert not targets & stations_touched(path[frame])
    first = script.hidden_frames[0]
    assert script.hidden_frames == tuple(range(first, first + gap * CHUNK + 3))
    frames = render_latent_frames(make_scene(1), [DAY] * len(script.moves), script.moves)
    np.testing.assert_array_equal(frames[script.target_frame], frames[script.return_frame])
    assert tuple(-move for move in script.moves) == benchmark_script(kind, gap, not mirror).moves


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("kind, gap", [("dwell", 0), ("dwell", 80), ("wander", 4), ("wander", 80)])
def test_a_trip_of_nine_columns_is_the_script_without_columns(kind, gap, mirror):
    elsewhere = {"dwell": [0] * gap, "wander": [1, 1, -1, -1] * (gap // 4)}[kind]
    moves = [0, 1, 1, 0, 1, 1, 1, *elsewhere, -1, -1, -1, 0, 0]
    script = benchmark_script(kind, gap, mirror, columns=9)
    assert script == benchmark_script(kind, gap, mirror)
    assert script.moves == tuple(-move for move in moves) if mirror else tuple(moves)


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("kind, gap", [("dwell", 8), ("wander", 8)])
@pytest.mark.parametrize("columns", [9, 18, 27, 33])
def test_longer_trips_hide_the_targets_all_the_way(columns, kind, gap, mirror):
    script = benchmark_script(kind, gap, mirror, columns)
    path = np.array(script.headings)
    away = np.abs(path - script.target_heading)[script.target_frame :]
    assert away.max() == columns + (6 if kind == "wander" else 0)
    assert (path[script.return_frame :] == script.target_heading).all()
    targets = stations_touched(script.target_heading)
    assert not any(targets & stations_touched(path[frame]) for frame in script.hidden_frames)
    first = script.hidden_frames[0]
    assert script.hidden_frames == tuple(range(first, first + 3 * gap + 3 + 2 * (columns - 9)))


def test_random_clips_return_to_something_that_was_hidden_for_a_chunk():
    returns = 0
    for seed in range(40):
        script = random_script(np.random.default_rng(seed), 12)
        path = headings(script)
        assert len(script) == 12 and set(script) <= {-1, 0, 1}
        away = np.abs(path[:, None] - path[None]) >= VIEW_COLUMNS
        returns += any(
            path[late] == path[early] and away[early, early:late].sum() >= CHUNK
            for late in range(len(path))
            for early in range(late)
        )
    assert returns >= 36


def test_random_styles_change_one_concept_at_most_once():
    changed = 0
    for seed in range(200):
        styles = random_styles(np.random.default_rng(seed), 12)
        changes = [(a, b) for a, b in itertools.pairwise(styles) if a != b]
        assert len(styles) == 12 and len(changes) <= 1
        for a, b in changes:
            assert (a.ground != b.ground) + (a.weather != b.weather) + (a.time != b.time) == 1
        changed += len(changes)
    assert 40 <= changed <= 80


def test_shared_pictures_cannot_be_written_to():
    for shared in (panorama(make_scene(), DAY), templates(DAY, 0), background(DAY)):
        with pytest.raises(ValueError, match="read-only"):
            shared[0] = 0


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda: Style(ground="sea"), "ground: 'sea'.*'meadow'"),
        (lambda: Style(weather="rain"), "weather: 'rain'"),
        (lambda: Style(time="noon"), "time: 'noon'"),
        (lambda: Scene(class_ids=(0,)), r"class_ids: \(0,\) must be 16"),
        (lambda: Scene(class_ids=(NUM_CLASSES,) * 16), "class_ids: .* 0 to 23"),
        (lambda: caption(DAY, 2), "move: 2"),
        (lambda: headings([0, 2]), "moves: 2"),
        (lambda: render_latent_frames(make_scene(), [DAY], [0, 1]), "moves: 2 entries for 1 styles"),
        (lambda: render_latent_frames(make_scene(), [], []), "moves: 0 entries"),
        (lambda: benchmark_script("sleep", 4, False), "kind: 'sleep'"),
        (lambda: benchmark_script("wander", 3, False), "gap_chunks: 3"),
        (lambda: benchmark_script("dwell", 4, False, 36), "columns: 36 is not one of 9, .*, 33"),
    ],
)
def test_bad_values_are_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()
