"""Sizes of the demo world, in art pixels (1 art pixel = 2 x 2 video pixels) and token columns."""

TOKEN = 8
"""Art pixels a token is wide and high."""
VIEW_COLUMNS = 8
VIEW_WIDTH = VIEW_COLUMNS * TOKEN
VIEW_HEIGHT = 32
NUM_STATIONS = 16
STATION_COLUMNS = 3
"""Token columns from one landmark to the next."""
RING_COLUMNS = NUM_STATIONS * STATION_COLUMNS
RING_WIDTH = RING_COLUMNS * TOKEN
LANDMARK_COLUMNS = 2
LANDMARK = LANDMARK_COLUMNS * TOKEN
"""Art pixels a landmark is wide and high."""
LANDMARK_TOP = 8
CHUNK = 3
"""Latent frames that share a prompt and a move."""


def stations_in_view(heading: int) -> list[tuple[int, int]]:
    """(station, view column) of every landmark in full view at a heading."""
    columns = [(s, (s * STATION_COLUMNS - int(heading)) % RING_COLUMNS) for s in range(NUM_STATIONS)]
    return [(station, column) for station, column in columns if column <= VIEW_COLUMNS - LANDMARK_COLUMNS]
