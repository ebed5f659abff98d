"""The bundled demo model: `python -m train.demo` trains it from generated text and measures it."""
