# Both commands start from nothing but Python >= 3.10 and a C++ compiler.

.PHONY: demo test

demo:
	python3 -m venv .venv
	.venv/bin/pip install torch==2.13.0
	.venv/bin/pip install ".[demo]"
	.venv/bin/trak-ext demo --out demo_out

test:
	python3 -m venv .venv
	.venv/bin/pip install torch==2.13.0
	.venv/bin/pip install ".[test]"
	.venv/bin/pytest
