"""podcast-benchmark's decorators, so that a file that was made for it can be loaded as it is.

    @registry.register_model_constructor("name")    # or without a name: the function's own
    def constructor(model_params): ...

model=my_file.py:name finds it; nothing else is registered.
"""


def register_model_constructor(name=None):
    """A decorator that lets a function be found under a name in its file."""

    def register(function):
        function.__globals__[name or function.__name__] = function
        return function

    return register


register_data_preprocessor = register_config_setter = register_model_constructor
