from ..cli.conftest import refused, run, save_tiny_student, student, succeeded  # noqa: F401
from ..nodes.conftest import node_module, schemas  # noqa: F401
