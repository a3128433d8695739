"""``python -m diffalign``."""

from diffalign.cli import main

main(prog_name="diffalign")
