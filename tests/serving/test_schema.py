"""The server does what /openapi.json says, for good requests and for bad ones, drawn from the schema.

Schemathesis has a process of its own: its plugin for pytest and the newest pytest do not go together. QR_TEST_EXAMPLES
draws more of each operation.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.serving.talking import Serving

# A schema cannot say which models are served, that a picture must open, or that texts must fit; and what JSON Schema
# takes for a whole number, such as 2.0, this server does not.
NOT_CHECKED = "positive_data_acceptance"
# 413 is a refusal too: lists that are far too long are not even read.
CONFIGURATION = """
[checks]
negative_data_rejection.expected-statuses = [400, 404, 405, 413, 415, 422]
"""


def test_every_answer_is_as_the_schema_says(serving: Serving, qr_mini: Any, qr_mini_vl: Any, tmp_path: Path) -> None:
    from qr_integrations.serving import ServerSettings

    short = {"max_documents": 20, "default_new_tokens": 1, "max_new_tokens": 2}
    program = "import sys; from schemathesis.cli import schemathesis; sys.exit(schemathesis())"
    options = ["--checks", "all", "--exclude-checks", NOT_CHECKED, "--seed", "1", "--generation-database", "none"]
    options += ["--max-examples", os.environ.get("QR_TEST_EXAMPLES", "3"), "--workers", "1", "--no-color"]
    options += ["--phases", "examples,coverage,fuzzing", "--wait-for-schema", "10", "--request-timeout", "60"]
    (tmp_path / "schemathesis.toml").write_text(CONFIGURATION, encoding="utf-8")
    with serving(ServerSettings(model="qr-mini", vision_model="qr-mini-vl", device="cpu", **short)) as url:
        command = [sys.executable, "-c", program, "run", f"{url}/openapi.json", *options]
        hooks = {"PYTHONPATH": str(Path(__file__).parent), "SCHEMATHESIS_HOOKS": "schema_hooks"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, **hooks})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "9 selected / 9 total" in done.stdout
    assert "Missing test data" not in done.stdout
