"""The checker that `conftest.py` puts on every function: as a static one, it takes an int for a float."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
