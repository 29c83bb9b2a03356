/* Copies of rows into the slots of a buffer in host memory, and out of them.

   numpy can do both, but not these two things, which save up to half the time where rows are short:

   - A row that is stored is not looked at for a long time, so it is written past the cache. An ordinary store fetches
     from memory what it is about to overwrite, and drives out of the cache what the training step works on.
   - Rows that are read lie far from one another. A processor sees a stream of addresses, and fetches ahead of it, only
     some misses after its begin; so a few short rows are read side by side.

   The GIL is given up for copies that take longer than a hand-off costs. All arguments are checked, so that no call
   touches memory that is not theirs. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

#define LINE 64        /* bytes of a line of the cache */
#define STREAMED 512   /* bytes from which on a cell is written past the cache */
#define ABREAST 4      /* rows that are read side by side */
#define LONG (1 << 16) /* bytes from which on a row is read alone */
#define HELD (1 << 16) /* bytes up to which a copy keeps the GIL: some 5 us */

static void write_past_cache(char *to, const char *from, size_t count)
{
#ifdef __SSE2__
    if (count >= STREAMED) {
        size_t head = -(uintptr_t)to % LINE; /* of a line that is not written as a whole */
        memcpy(to, from, head);
        for (to += head, from += head, count -= head; count >= LINE; to += LINE, from += LINE, count -= LINE)
            for (int part = 0; part < LINE; part += 16)
                _mm_stream_si128((__m128i *)(to + part), _mm_loadu_si128((const __m128i *)(from + part)));
    }
#endif
    memcpy(to, from, count);
}

static inline int64_t at(const Py_buffer *index, Py_ssize_t i)
{
    int64_t number;
    memcpy(&number, (const char *)index->buf + i * index->strides[0], sizeof number);
    return number;
}

static void write_cells(const Py_buffer *cells, const Py_buffer *slots, const char *from, const Py_buffer *places)
{
    Py_ssize_t nbytes = cells->shape[1];
    for (Py_ssize_t i = 0; i < slots->shape[0]; i++)
        write_past_cache((char *)cells->buf + at(slots, i) * cells->strides[0],
                         from + (places->obj ? at(places, i) : i) * nbytes, nbytes);
#ifdef __SSE2__
    _mm_sfence(); /* what went past the cache is seen by whoever sees what is written from now on */
#endif
}

static inline void read_abreast(const char *rows, Py_ssize_t nbytes, const Py_buffer *slots, Py_ssize_t first,
                                Py_ssize_t count, char *out)
{
    const char *from[ABREAST];
    Py_ssize_t whole = nbytes / LINE * LINE;
    for (Py_ssize_t i = 0; i < count; i++)
        from[i] = rows + at(slots, first + i) * nbytes;
    out += first * nbytes;
    for (Py_ssize_t done = 0; done < whole; done += LINE)
        for (Py_ssize_t i = 0; i < count; i++)
            memcpy(out + i * nbytes + done, from[i] + done, LINE);
    for (Py_ssize_t i = 0; i < count; i++)
        memcpy(out + i * nbytes + whole, from[i] + whole, nbytes - whole);
}

static void read_rows(const char *rows, Py_ssize_t nbytes, const Py_buffer *slots, char *out)
{
    Py_ssize_t done = 0, count = slots->shape[0];
    if (nbytes >= LONG) {
        for (; done < count; done++)
            memcpy(out + done * nbytes, rows + at(slots, done) * nbytes, nbytes);
        return;
    }
    for (; done + ABREAST <= count; done += ABREAST)
        read_abreast(rows, nbytes, slots, done, ABREAST, out);
    read_abreast(rows, nbytes, slots, done, count - done, out);
}

/* Open a buffer `[n, nbytes]` of bytes whose rows are whole. */
static int open_bytes(PyObject *object, const char *name, int flags, Py_buffer *bytes)
{
    if (PyObject_GetBuffer(object, bytes, flags) < 0)
        return -1;
    if (bytes->ndim == 2 && bytes->itemsize == 1 && (!bytes->strides || bytes->shape[1] < 2 || bytes->strides[1] == 1))
        return 0;
    PyErr_Format(PyExc_ValueError, "%s must be rows of bytes that lie side by side", name);
    PyBuffer_Release(bytes);
    return -1;
}

/* Open a buffer `[n]` of 8-byte numbers from 0 to `bound - 1`. */
static int open_index(PyObject *object, const char *name, Py_ssize_t bound, Py_buffer *index)
{
    if (PyObject_GetBuffer(object, index, PyBUF_STRIDES) < 0)
        return -1;
    if (index->ndim != 1 || index->itemsize != sizeof(int64_t)) {
        PyErr_Format(PyExc_ValueError, "%s must have one dimension and items of 8 bytes", name);
        goto failed;
    }
    for (Py_ssize_t i = 0; i < index->shape[0]; i++)
        if (at(index, i) < 0 || at(index, i) >= bound) {
            PyErr_Format(PyExc_IndexError, "%s has %lld of %zd", name, (long long)at(index, i), bound);
            goto failed;
        }
    return 0;
failed:
    PyBuffer_Release(index);
    return -1;
}

static PyObject *scatter(PyObject *module, PyObject *arguments)
{
    PyObject *to, *at, *given, *which, *result = NULL;
    Py_buffer cells, slots, column, places = {0};
    if (!PyArg_ParseTuple(arguments, "OOOO", &to, &at, &given, &which) ||
        open_bytes(to, "cells", PyBUF_STRIDES | PyBUF_WRITABLE, &cells) < 0)
        return NULL;
    if (open_index(at, "slots", cells.shape[0], &slots) < 0)
        goto close_cells;
    if (PyObject_GetBuffer(given, &column, PyBUF_SIMPLE) < 0)
        goto close_slots;
    Py_ssize_t count = slots.shape[0], nbytes = cells.shape[1], samples = nbytes ? column.len / nbytes : 0;
    if (which != Py_None && open_index(which, "places", samples, &places) < 0)
        goto close_column;
    if (samples * nbytes != column.len || count != (places.obj ? places.shape[0] : samples)) {
        PyErr_Format(PyExc_ValueError, "%zd bytes are not what %zd cells of %zd bytes need", column.len, count, nbytes);
        goto close_places;
    }
    PyThreadState *others = count * nbytes > HELD ? PyEval_SaveThread() : NULL;
    write_cells(&cells, &slots, column.buf, &places);
    if (others)
        PyEval_RestoreThread(others);
    result = Py_NewRef(Py_None);
close_places:
    if (places.obj)
        PyBuffer_Release(&places);
close_column:
    PyBuffer_Release(&column);
close_slots:
    PyBuffer_Release(&slots);
close_cells:
    PyBuffer_Release(&cells);
    return result;
}

static PyObject *gather(PyObject *module, PyObject *arguments)
{
    PyObject *from, *at, *to, *result = NULL;
    Py_buffer rows, slots, out;
    if (!PyArg_ParseTuple(arguments, "OOO", &from, &at, &to) || open_bytes(from, "rows", PyBUF_ND, &rows) < 0)
        return NULL;
    if (open_index(at, "slots", rows.shape[0], &slots) < 0)
        goto close_rows;
    if (open_bytes(to, "out", PyBUF_ND | PyBUF_WRITABLE, &out) < 0)
        goto close_slots;
    if (out.shape[0] != slots.shape[0] || out.shape[1] != rows.shape[1]) {
        PyErr_Format(PyExc_ValueError, "out is [%zd, %zd] and %zd rows of %zd bytes are wanted", out.shape[0],
                     out.shape[1], slots.shape[0], rows.shape[1]);
        goto close_out;
    }
    PyThreadState *others = out.len > HELD ? PyEval_SaveThread() : NULL;
    read_rows(rows.buf, rows.shape[1], &slots, out.buf);
    if (others)
        PyEval_RestoreThread(others);
    result = Py_NewRef(Py_None);
close_out:
    PyBuffer_Release(&out);
close_slots:
    PyBuffer_Release(&slots);
close_rows:
    PyBuffer_Release(&rows);
    return result;
}

static PyMethodDef functions[] = {
    {"scatter", scatter, METH_VARARGS, "scatter(cells, slots, column, places)\n--\n\nStore samples as rows."},
    {"gather", gather, METH_VARARGS, "gather(rows, slots, out)\n--\n\nRead rows."},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "copies",
    .m_doc = "Copies of rows into the slots of a buffer in host memory, and out of them.",
    .m_size = -1,
    .m_methods = functions,
};

PyMODINIT_FUNC PyInit_copies(void) { return PyModule_Create(&definition); }
