"""What several test files share: small data sets, processes to kill, stand-ins for commands."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
