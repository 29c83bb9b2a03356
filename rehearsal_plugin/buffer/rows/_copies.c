/* Copies of rows into the slots of a buffer in host memory, and out of them.

   numpy can do both, but not these two things, which save up to half the time where rows are short:

   - What is stored is not looked at for a long time, and a batch that is large enough to matter would not stay in the
     cache until it is; so both are written past it. An ordinary store fetches from memory what it is about to
     overwrite, and drives out of the cache what the training step works on.
   - Rows that are read lie far from one another. A processor sees a stream of addresses, and fetches ahead of it, only
     some misses after its begin; so a few short rows are read side by side.

   Both go line by line, and take a line at once where the processor has AVX-512.

   The GIL is given up for copies that take longer than a hand-off costs. All arguments are checked, so that no call
   touches memory that is not theirs. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

/* One build serves Python 3.10 and all later ones: it keeps to the limited API (Py_LIMITED_API, of 3.10). Buffers are a
   part of that from 3.11 on; those of 3.10 are the same, and only not promised, so what is used of them stands here. */
#if defined(Py_LIMITED_API) && Py_LIMITED_API + 0 < 0x030B0000
typedef struct {
    void *buf;
    PyObject *obj;
    Py_ssize_t len, itemsize;
    int readonly, ndim;
    char *format;
    Py_ssize_t *shape, *strides, *suboffsets;
    void *internal;
} Py_buffer;
PyAPI_FUNC(int) PyObject_GetBuffer(PyObject *object, Py_buffer *view, int flags);
PyAPI_FUNC(void) PyBuffer_Release(Py_buffer *view);
#define PyBUF_SIMPLE 0
#define PyBUF_WRITABLE 0x0001
#define PyBUF_ND 0x0008
#define PyBUF_STRIDES (0x0010 | PyBUF_ND)
#endif
/* COPIES_NARROW builds it as for a processor without AVX-512, COPIES_PLAIN as for any other: tests reach these too. */
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(COPIES_PLAIN)
#define STREAMS
#include <immintrin.h>
#endif
#if defined(STREAMS) && !defined(COPIES_NARROW) /* the loader of glibc chooses between clones */
#define WIDE __attribute__((target_clones("avx512f", "default")))
#define IS_WIDE __builtin_cpu_supports("avx512f")
#else
#define WIDE
#define IS_WIDE 0
#endif

#define LINE 64        /* bytes of a line of the cache */
#define STREAMED 512   /* bytes from which on a field is written past the cache */
#define ABREAST 4      /* rows that are read side by side */
#define LONG (1 << 16) /* bytes from which on a row is read alone */
#define HELD (1 << 16) /* bytes up to which a copy keeps the GIL: some 5 us */

typedef char Line __attribute__((vector_size(LINE), aligned(1), may_alias));

#ifdef STREAMS
__attribute__((target("avx512f"))) static void stream_wide(char *to, const char *from, size_t lines)
{
    for (; lines--; to += LINE, from += LINE)
        _mm512_stream_si512((__m512i *)to, _mm512_loadu_si512(from));
}

static void stream(char *to, const char *from, size_t lines)
{
    for (; lines--; to += LINE, from += LINE)
        for (int part = 0; part < LINE; part += 16)
            _mm_stream_si128((__m128i *)(to + part), _mm_loadu_si128((const __m128i *)(from + part)));
}
#endif

static void write_past_cache(char *to, const char *from, size_t count)
{
#ifdef STREAMS
    if (count >= STREAMED) {
        size_t head = -(uintptr_t)to % LINE, whole; /* of a line that is not written as a whole */
        memcpy(to, from, head);
        to += head, from += head, count -= head;
        whole = count / LINE * LINE;
        (IS_WIDE ? stream_wide : stream)(to, from, whole / LINE);
        to += whole, from += whole, count -= whole;
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

/* One field of the samples that are stored. */
typedef struct {
    Py_buffer samples;
    Py_ssize_t offset, nbytes; /* in a row */
} Column;

static void write_column(const Py_buffer *rows, const Py_buffer *slots, const Column *column, const Py_buffer *places)
{
    char *cells = (char *)rows->buf + column->offset;
    const char *from = column->samples.buf;
    for (Py_ssize_t i = 0; i < slots->shape[0]; i++)
        write_past_cache(cells + at(slots, i) * rows->shape[1],
                         from + (places->obj ? at(places, i) : i) * column->nbytes, column->nbytes);
}

static void write_columns(const Py_buffer *rows, const Py_buffer *slots, const Column *columns, Py_ssize_t count,
                          const Py_buffer *places)
{
    for (Py_ssize_t i = 0; i < count; i++)
        write_column(rows, slots, &columns[i], places);
#ifdef STREAMS
    _mm_sfence(); /* what went past the cache is seen by whoever sees what is written from now on */
#endif
}

WIDE static void read_abreast(const char *rows, Py_ssize_t nbytes, const Py_buffer *slots, Py_ssize_t first,
                              Py_ssize_t count, char *out)
{
    const char *from[ABREAST];
    Py_ssize_t whole = nbytes / LINE * LINE;
    for (Py_ssize_t i = 0; i < count; i++)
        from[i] = rows + at(slots, first + i) * nbytes;
    out += first * nbytes;
    for (Py_ssize_t done = 0; done < whole; done += LINE)
        for (Py_ssize_t i = 0; i < count; i++)
            *(Line *)(out + i * nbytes + done) = *(const Line *)(from[i] + done);
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

/* Open a contiguous buffer `[n, nbytes]` of bytes. */
static int open_bytes(PyObject *object, const char *name, int flags, Py_buffer *bytes)
{
    if (PyObject_GetBuffer(object, bytes, PyBUF_ND | flags) < 0)
        return -1;
    if (bytes->ndim == 2 && bytes->itemsize == 1)
        return 0;
    PyErr_Format(PyExc_ValueError, "%s must be rows of bytes", name);
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

static void close_columns(Column *columns, Py_ssize_t count)
{
    while (count--)
        PyBuffer_Release(&columns[count].samples);
    PyMem_Free(columns);
}

/* Open a contiguous buffer `[samples, ...]` whose samples lie at `offset` in a row of `row_bytes`. */
static int open_column(PyObject *object, PyObject *offset, Py_ssize_t row_bytes, Column *column)
{
    Py_buffer *samples = &column->samples;
    column->offset = PyLong_AsSsize_t(offset);
    if ((column->offset == -1 && PyErr_Occurred()) || PyObject_GetBuffer(object, samples, PyBUF_ND) < 0)
        return -1;
    column->nbytes = samples->ndim && samples->shape[0] ? samples->len / samples->shape[0] : 0;
    if (samples->ndim && column->offset >= 0 && column->offset <= row_bytes - column->nbytes)
        return 0;
    PyErr_Format(PyExc_ValueError, "a column of %zd bytes a sample does not fit at %zd in rows of %zd bytes",
                 column->nbytes, column->offset, row_bytes);
    PyBuffer_Release(samples);
    return -1;
}

/* Open columns of as many samples each; returns how many there are, -1 after an error. */
static Py_ssize_t open_columns(PyObject *given, PyObject *offsets, Py_ssize_t row_bytes, Column **columns)
{
    if (!PyList_Check(given) || !PyList_Check(offsets) || !PyList_Size(given) ||
        PyList_Size(given) != PyList_Size(offsets)) {
        PyErr_SetString(PyExc_ValueError, "offsets and columns must be lists of one length, at least 1");
        return -1;
    }
    Py_ssize_t opened = 0, count = PyList_Size(given);
    if (!(*columns = PyMem_New(Column, count))) {
        PyErr_NoMemory();
        return -1;
    }
    for (; opened < count; opened++) {
        Column *column = &(*columns)[opened];
        if (open_column(PyList_GetItem(given, opened), PyList_GetItem(offsets, opened), row_bytes, column) < 0)
            goto failed;
        if (column->samples.shape[0] != (*columns)->samples.shape[0]) {
            PyErr_SetString(PyExc_ValueError, "columns must have one number of samples");
            opened++;
            goto failed;
        }
    }
    return count;
failed:
    close_columns(*columns, opened);
    return -1;
}

static PyObject *scatter(PyObject *module, PyObject *arguments)
{
    PyObject *to, *at, *offsets, *given, *which, *result = NULL;
    Py_buffer rows, slots, places = {0};
    Column *columns;
    if (!PyArg_ParseTuple(arguments, "OOOOO", &to, &at, &offsets, &given, &which) ||
        open_bytes(to, "rows", PyBUF_WRITABLE, &rows) < 0)
        return NULL;
    if (open_index(at, "slots", rows.shape[0], &slots) < 0)
        goto close_rows;
    Py_ssize_t count = open_columns(given, offsets, rows.shape[1], &columns);
    if (count < 0)
        goto close_slots;
    Py_ssize_t samples = columns->samples.shape[0];
    if (which != Py_None && open_index(which, "places", samples, &places) < 0)
        goto close_columns;
    Py_ssize_t chosen = places.obj ? places.shape[0] : samples;
    if (slots.shape[0] != chosen) {
        PyErr_Format(PyExc_ValueError, "%zd samples are not what %zd slots need", chosen, slots.shape[0]);
        goto close_places;
    }
    PyThreadState *others = slots.shape[0] * rows.shape[1] > HELD ? PyEval_SaveThread() : NULL;
    write_columns(&rows, &slots, columns, count, &places);
    if (others)
        PyEval_RestoreThread(others);
    result = Py_NewRef(Py_None);
close_places:
    if (places.obj)
        PyBuffer_Release(&places);
close_columns:
    close_columns(columns, count);
close_slots:
    PyBuffer_Release(&slots);
close_rows:
    PyBuffer_Release(&rows);
    return result;
}

static PyObject *gather(PyObject *module, PyObject *arguments)
{
    PyObject *from, *at, *to, *result = NULL;
    Py_buffer rows, slots, out;
    if (!PyArg_ParseTuple(arguments, "OOO", &from, &at, &to) || open_bytes(from, "rows", PyBUF_SIMPLE, &rows) < 0)
        return NULL;
    if (open_index(at, "slots", rows.shape[0], &slots) < 0)
        goto close_rows;
    if (open_bytes(to, "out", PyBUF_WRITABLE, &out) < 0)
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

/* Runs of bytes, each in one of several arrays. */
typedef struct {
    Py_buffer *arrays; /* those that are held, one or more for each array */
    Py_ssize_t held;
    char **runs; /* where each run begins */
} Runs;

static void close_runs(Runs *runs)
{
    while (runs->held--)
        PyBuffer_Release(&runs->arrays[runs->held]);
    PyMem_Free(runs->arrays);
    PyMem_Free(runs->runs);
}

/* Find run `i`; runs of one array mostly follow each other, and then it is held once. */
static int find_run(PyObject *given, const Py_buffer *which, Py_ssize_t i, Py_ssize_t start, Py_ssize_t size, int flags,
                    Runs *runs)
{
    if (!i || at(which, i) != at(which, i - 1)) {
        if (PyObject_GetBuffer(PyList_GetItem(given, at(which, i)), &runs->arrays[runs->held], flags) < 0)
            return -1;
        runs->held++;
    }
    Py_buffer *array = &runs->arrays[runs->held - 1];
    if (start > array->len || size > array->len - start) {
        PyErr_Format(PyExc_IndexError, "a run of %zd bytes from %zd on in an array of %zd", size, start, array->len);
        return -1;
    }
    runs->runs[i] = (char *)array->buf + start;
    return 0;
}

/* Find runs of `sizes` bytes that begin at `starts` of the arrays `which` in a list. */
static int open_runs(PyObject *given, PyObject *of, PyObject *from, const Py_buffer *sizes, int flags, Runs *runs)
{
    Py_buffer which, starts;
    Py_ssize_t count = sizes->shape[0];
    int result = -1;
    if (!PyList_Check(given)) {
        PyErr_SetString(PyExc_ValueError, "arrays must be a list");
        return -1;
    }
    if (open_index(of, "arrays", PyList_Size(given), &which) < 0)
        return -1;
    if (open_index(from, "starts", PY_SSIZE_T_MAX, &starts) < 0)
        goto close_which;
    if (which.shape[0] != count || starts.shape[0] != count) {
        PyErr_SetString(PyExc_ValueError, "there must be one array, one start and one size of each run");
        goto close_starts;
    }
    runs->held = 0;
    runs->arrays = PyMem_New(Py_buffer, count + 1);
    runs->runs = PyMem_New(char *, count + 1);
    result = runs->arrays && runs->runs ? 0 : -1;
    if (result < 0)
        PyErr_NoMemory();
    for (Py_ssize_t i = 0; i < count && result == 0; i++)
        result = find_run(given, &which, i, at(&starts, i), at(sizes, i), flags, runs);
    if (result < 0)
        close_runs(runs);
close_starts:
    PyBuffer_Release(&starts);
close_which:
    PyBuffer_Release(&which);
    return result;
}

/* Past the cache, as all runs are: rows that are moved or saved are as little looked at as those that are stored. */
static void copy_all_runs(const Runs *to, const Runs *from, const Py_buffer *sizes)
{
    for (Py_ssize_t i = 0; i < sizes->shape[0]; i++) {
        if (i + ABREAST < sizes->shape[0])
            __builtin_prefetch(from->runs[i + ABREAST]);
        write_past_cache(to->runs[i], from->runs[i], at(sizes, i));
    }
#ifdef STREAMS
    _mm_sfence();
#endif
}

static Py_ssize_t sum_of(const Py_buffer *sizes)
{
    Py_ssize_t total = 0;
    for (Py_ssize_t i = 0; i < sizes->shape[0]; i++)
        total += at(sizes, i);
    return total;
}

static PyObject *copy_runs(PyObject *module, PyObject *arguments)
{
    PyObject *given[7], *result = NULL;
    Py_buffer sizes;
    Runs to, from;
    if (!PyArg_ParseTuple(arguments, "OOOOOOO", &given[0], &given[1], &given[2], &given[3], &given[4], &given[5],
                          &given[6]) ||
        open_index(given[6], "sizes", PY_SSIZE_T_MAX, &sizes) < 0)
        return NULL;
    if (open_runs(given[0], given[1], given[2], &sizes, PyBUF_WRITABLE, &to) < 0)
        goto close_sizes;
    if (open_runs(given[3], given[4], given[5], &sizes, PyBUF_SIMPLE, &from) < 0)
        goto close_to;
    PyThreadState *others = sum_of(&sizes) > HELD ? PyEval_SaveThread() : NULL;
    copy_all_runs(&to, &from, &sizes);
    if (others)
        PyEval_RestoreThread(others);
    result = Py_NewRef(Py_None);
    close_runs(&from);
close_to:
    close_runs(&to);
close_sizes:
    PyBuffer_Release(&sizes);
    return result;
}

#define BLOCK 512 /* bytes that are compared at once */

/* Positions of `step` bytes up to the last that differs from the blank, of `count`; `least` where it is before that. */
static int64_t length_of(const char *cells, const char *blank, Py_ssize_t step, int64_t count, int64_t least)
{
    int64_t block = BLOCK / step ? BLOCK / step : 1;
    while (count >= least + block &&
           !memcmp(cells + (count - block) * step, blank + (count - block) * step, block * step))
        count -= block;
    while (count > least && !memcmp(cells + (count - 1) * step, blank + (count - 1) * step, step))
        count--;
    return count > least ? count : least;
}

static PyObject *find_lengths(PyObject *module, PyObject *arguments)
{
    PyObject *from, *which, *like, *most, *to, *result = NULL;
    Py_buffer rows, places, blank, bounds, lengths;
    Py_ssize_t offset, step;
    if (!PyArg_ParseTuple(arguments, "OOOnnOO", &from, &which, &like, &offset, &step, &most, &to) ||
        open_bytes(from, "rows", PyBUF_SIMPLE, &rows) < 0)
        return NULL;
    if (open_index(which, "places", rows.shape[0], &places) < 0)
        goto close_rows;
    if (PyObject_GetBuffer(like, &blank, PyBUF_SIMPLE) < 0)
        goto close_places;
    if (offset < 0 || step < 1 || offset > rows.shape[1] || blank.len != rows.shape[1]) {
        PyErr_SetString(PyExc_ValueError, "the field does not fit the rows");
        goto close_blank;
    }
    if (open_index(most, "bounds", (rows.shape[1] - offset) / step + 1, &bounds) < 0)
        goto close_blank;
    if (PyObject_GetBuffer(to, &lengths, PyBUF_WRITABLE) < 0)
        goto close_bounds;
    if (bounds.shape[0] != rows.shape[0] || lengths.len != places.shape[0] * (Py_ssize_t)sizeof(int64_t)) {
        PyErr_SetString(PyExc_ValueError, "the bounds or the lengths do not fit the number of rows");
        goto close_lengths;
    }
    int64_t total = 0; /* bytes that may have to be looked at */
    for (Py_ssize_t i = 0; i < places.shape[0]; i++)
        total += at(&bounds, at(&places, i)) * step;
    PyThreadState *others = total > HELD ? PyEval_SaveThread() : NULL;
    for (Py_ssize_t i = 0; i < places.shape[0]; i++) {
        int64_t row = at(&places, i), *length = (int64_t *)lengths.buf + i;
        *length = length_of((const char *)rows.buf + row * rows.shape[1] + offset, (const char *)blank.buf + offset,
                            step, at(&bounds, row), *length);
    }
    if (others)
        PyEval_RestoreThread(others);
    result = Py_NewRef(Py_None);
close_lengths:
    PyBuffer_Release(&lengths);
close_bounds:
    PyBuffer_Release(&bounds);
close_blank:
    PyBuffer_Release(&blank);
close_places:
    PyBuffer_Release(&places);
close_rows:
    PyBuffer_Release(&rows);
    return result;
}

/* The pieces of a row, of `fixed` bytes or of `steps` bytes a position each, and the lengths of rows in positions. */
typedef struct {
    Py_buffer lengths, offsets, fixed, steps;
    int64_t *sizes; /* bytes of each trimmed row */
} Cut;

static void close_cut(Cut *cut)
{
    PyMem_Free(cut->sizes);
    PyBuffer_Release(&cut->steps);
    PyBuffer_Release(&cut->fixed);
    PyBuffer_Release(&cut->offsets);
    PyBuffer_Release(&cut->lengths);
}

/* Check that rows of `longest` positions fit, and find the sizes of the trimmed ones. */
static int measure_cut(Cut *cut, int64_t longest, Py_ssize_t row_bytes)
{
    Py_ssize_t count = cut->lengths.shape[0], pieces = cut->offsets.shape[0];
    int64_t fixed = 0, steps = 0;
    if (cut->fixed.shape[0] != pieces || cut->steps.shape[0] != pieces) {
        PyErr_SetString(PyExc_ValueError, "pieces must have an offset, fixed bytes and a step each");
        return -1;
    }
    for (Py_ssize_t p = 0; p < pieces; p++) {
        int64_t left = row_bytes - at(&cut->offsets, p) - at(&cut->fixed, p), step = at(&cut->steps, p);
        if (left < 0 || (step && longest > left / step)) {
            PyErr_SetString(PyExc_ValueError, "a piece does not fit the rows");
            return -1;
        }
        fixed += at(&cut->fixed, p), steps += step;
    }
    if (!(cut->sizes = PyMem_New(int64_t, count + 1))) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < count; i++)
        cut->sizes[i] = fixed + at(&cut->lengths, i) * steps;
    return 0;
}

/* Open the pieces of rows that have up to `longest` positions, or up to the longest of theirs. */
static int open_cut(PyObject *lengths, PyObject *offsets, PyObject *fixed, PyObject *steps, int64_t longest,
                    Py_ssize_t row_bytes, Cut *cut)
{
    *cut = (Cut){0}; /* a buffer that was not opened may be released */
    if (open_index(lengths, "lengths", row_bytes + 1, &cut->lengths) < 0 ||
        open_index(offsets, "offsets", row_bytes + 1, &cut->offsets) < 0 ||
        open_index(fixed, "fixed", row_bytes + 1, &cut->fixed) < 0 ||
        open_index(steps, "steps", row_bytes + 1, &cut->steps) < 0)
        goto failed;
    for (Py_ssize_t i = 0; i < cut->lengths.shape[0]; i++)
        longest = at(&cut->lengths, i) > longest ? at(&cut->lengths, i) : longest;
    if (measure_cut(cut, longest, row_bytes) == 0)
        return 0;
failed:
    close_cut(cut);
    return -1;
}

static int open_trimmed(PyObject *arrays, PyObject *which, PyObject *starts, const Cut *cut, int flags, Runs *runs)
{
    Py_ssize_t stride = sizeof(int64_t);
    Py_buffer sizes = {.buf = cut->sizes, .shape = cut->lengths.shape, .strides = &stride};
    return open_runs(arrays, which, starts, &sizes, flags, runs);
}

static int64_t bytes_of_cut(const Cut *cut)
{
    int64_t total = 0;
    for (Py_ssize_t i = 0; i < cut->lengths.shape[0]; i++)
        total += cut->sizes[i];
    return total;
}

static void trim_row(const char *row, const Cut *cut, int64_t length, char *to)
{
    for (Py_ssize_t p = 0; p < cut->offsets.shape[0]; p++) {
        int64_t nbytes = at(&cut->fixed, p) + length * at(&cut->steps, p);
        write_past_cache(to, row + at(&cut->offsets, p), nbytes);
        to += nbytes;
    }
}

static PyObject *trim_rows(PyObject *module, PyObject *arguments)
{
    PyObject *from, *chosen, *given[7], *result = NULL;
    Py_buffer rows, places;
    Cut cut;
    Runs to;
    if (!PyArg_ParseTuple(arguments, "OOOOOOOOO", &from, &chosen, &given[0], &given[1], &given[2], &given[3],
                          &given[4], &given[5], &given[6]) ||
        open_bytes(from, "rows", PyBUF_SIMPLE, &rows) < 0)
        return NULL;
    if (open_index(chosen, "places", rows.shape[0], &places) < 0)
        goto close_rows;
    if (open_cut(given[0], given[1], given[2], given[3], 0, rows.shape[1], &cut) < 0)
        goto close_places;
    if (cut.lengths.shape[0] != places.shape[0]) {
        PyErr_SetString(PyExc_ValueError, "there must be one length of each row");
        goto close_cut;
    }
    if (open_trimmed(given[4], given[5], given[6], &cut, PyBUF_WRITABLE, &to) < 0)
        goto close_cut;
    PyThreadState *others = bytes_of_cut(&cut) > HELD ? PyEval_SaveThread() : NULL;
    for (Py_ssize_t i = 0; i < places.shape[0]; i++)
        trim_row((const char *)rows.buf + at(&places, i) * rows.shape[1], &cut, at(&cut.lengths, i), to.runs[i]);
#ifdef STREAMS
    _mm_sfence();
#endif
    if (others)
        PyEval_RestoreThread(others);
    result = Py_NewRef(Py_None);
    close_runs(&to);
close_cut:
    close_cut(&cut);
close_places:
    PyBuffer_Release(&places);
close_rows:
    PyBuffer_Release(&rows);
    return result;
}

static void pad_row(const char *from, const Cut *cut, int64_t length, const char *blank, char *row, int64_t bound)
{
    for (Py_ssize_t p = 0; p < cut->offsets.shape[0]; p++) {
        int64_t step = at(&cut->steps, p), nbytes = at(&cut->fixed, p) + length * step;
        int64_t behind = at(&cut->offsets, p) + nbytes;
        memcpy(row + at(&cut->offsets, p), from, nbytes);
        from += nbytes;
        if (step && bound > length)
            memcpy(row + behind, blank + behind, (bound - length) * step);
    }
}

/* Fetch the begin of a row, from where the processor fetches ahead by itself. */
static inline void fetch(const char *row, int64_t nbytes)
{
    for (int64_t done = 0; done < nbytes && done < ABREAST * LINE; done += LINE)
        __builtin_prefetch(row + done);
}

static void pad_all_rows(const Runs *from, const Cut *cut, const char *blank, const Py_buffer *out, int64_t *bounds)
{
    for (Py_ssize_t i = 0; i < out->shape[0]; i++) {
        int64_t length = at(&cut->lengths, i);
        if (i + 1 < out->shape[0])
            fetch(from->runs[i + 1], cut->sizes[i + 1]);
        pad_row(from->runs[i], cut, length, blank, (char *)out->buf + i * out->shape[1], bounds[i]);
        bounds[i] = length;
    }
}

static PyObject *pad_rows(PyObject *module, PyObject *arguments)
{
    PyObject *given[7], *like, *to, *known, *result = NULL;
    Py_buffer out, blank, bounds;
    Cut cut;
    Runs from;
    int64_t longest = 0;
    if (!PyArg_ParseTuple(arguments, "OOOOOOOOOO", &given[0], &given[1], &given[2], &given[3], &given[4], &given[5],
                          &given[6], &like, &to, &known) ||
        open_bytes(to, "out", PyBUF_WRITABLE, &out) < 0)
        return NULL;
    if (PyObject_GetBuffer(like, &blank, PyBUF_SIMPLE) < 0)
        goto close_out;
    if (PyObject_GetBuffer(known, &bounds, PyBUF_WRITABLE) < 0)
        goto close_blank;
    if (blank.len != out.shape[1] || bounds.len != out.shape[0] * (Py_ssize_t)sizeof(int64_t)) {
        PyErr_SetString(PyExc_ValueError, "the blank row or the bounds do not fit the rows");
        goto close_bounds;
    }
    for (Py_ssize_t i = 0; i < out.shape[0]; i++)
        longest = ((int64_t *)bounds.buf)[i] > longest ? ((int64_t *)bounds.buf)[i] : longest;
    if (open_cut(given[3], given[4], given[5], given[6], longest, out.shape[1], &cut) < 0)
        goto close_bounds;
    if (cut.lengths.shape[0] != out.shape[0]) {
        PyErr_SetString(PyExc_ValueError, "there must be one length of each row");
        goto close_cut;
    }
    if (open_trimmed(given[0], given[1], given[2], &cut, PyBUF_SIMPLE, &from) < 0)
        goto close_cut;
    PyThreadState *others = bytes_of_cut(&cut) > HELD ? PyEval_SaveThread() : NULL;
    pad_all_rows(&from, &cut, blank.buf, &out, bounds.buf);
    if (others)
        PyEval_RestoreThread(others);
    result = Py_NewRef(Py_None);
    close_runs(&from);
close_cut:
    close_cut(&cut);
close_bounds:
    PyBuffer_Release(&bounds);
close_blank:
    PyBuffer_Release(&blank);
close_out:
    PyBuffer_Release(&out);
    return result;
}

static PyMethodDef functions[] = {
    {"find_lengths", find_lengths, METH_VARARGS,
     "find_lengths(rows, places, blank, offset, step, bounds, lengths)\n--\n\nFind where padding begins."},
    {"trim_rows", trim_rows, METH_VARARGS,
     "trim_rows(rows, places, lengths, offsets, fixed, steps, to, which, starts)\n--\n\nCopy rows without padding."},
    {"pad_rows", pad_rows, METH_VARARGS,
     "pad_rows(source, which, starts, lengths, offsets, fixed, steps, blank, out, bounds)\n--\n\nCopy and pad rows."},
    {"copy_runs", copy_runs, METH_VARARGS,
     "copy_runs(to, to_array, to_start, source, from_array, from_start, sizes)\n--\n\nCopy runs of bytes."},
    {"scatter", scatter, METH_VARARGS, "scatter(rows, slots, offsets, columns, places)\n--\n\nStore samples as rows."},
    {"gather", gather, METH_VARARGS, "gather(rows, slots, out)\n--\n\nRead rows."},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_copies",
    .m_doc = "Copies of rows into the slots of a buffer in host memory, and out of them.",
    .m_size = -1,
    .m_methods = functions,
};

PyMODINIT_FUNC PyInit__copies(void) { return PyModule_Create(&definition); }
