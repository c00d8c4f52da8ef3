// Has no content: it carries the precompiled header of the project (see compiler.cmake).
