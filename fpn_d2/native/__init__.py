"""C++ sources, and the one way to declare, build, load, try and switch them off (``FPN_D2_NATIVE``)."""
