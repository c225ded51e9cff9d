"""The package `pagating` as `import pagating` shows it."""

import pagating


def test_the_package_lists_its_names_and_its_version():
    assert {"load_model", "patch", "PaGLU", "__version__"} <= set(dir(pagating))
    assert set(pagating.__all__) < set(dir(pagating))
    assert pagating.__version__.count(".") == 2
