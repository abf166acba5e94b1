"""The ops inside models that other people wrote. Each module needs the library that it is named after."""
