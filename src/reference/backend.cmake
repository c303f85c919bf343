flashprefill_add_backend(Reference SOURCES backend.cc select.cc attend.cc)
