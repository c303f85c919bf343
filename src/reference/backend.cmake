flashprefill_add_backend(Reference SOURCES backend.cc rows.cc select.cc attend.cc audit.cc energies.cc top_p.cc strided.cc
                         vertical_slash.cc)
flashprefill_add_selectors(reference Reference)
