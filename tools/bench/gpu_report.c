/* What `kvgate-bench gpu` says: a line for each row as it comes, and the whole as JSON. */
#include "tools/bench/gpu.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

static bool begins_with(const char *text, const char *beginning)
{
	return strncmp(text, beginning, strlen(beginning)) == 0;
}

bool gpu_wants(const struct gpu_bench *bench, const char *id)
{
	return !bench->only || begins_with(id, bench->only);
}

/* Whether the row meets the bars given; a bar that needs the time of a rival measured elsewhere is not met here. */
static bool meets(const struct gpu_row *row, double us, double ratio)
{
	if (us > 0 && row->us > us)
		return false;
	if (ratio <= 0)
		return true;
	if (row->ratio_of_floor)
		return row->floor_us / row->us >= ratio;
	return row->rival_us > 0 && row->us / row->rival_us <= ratio;
}

/* "then", "first" or "no"; "" when there is no bar. */
static const char *bar_met(const struct gpu_row *row)
{
	bool has_then = row->then_us > 0 || row->then_ratio > 0, has_first = row->first_us > 0 || row->first_ratio > 0;

	if (has_then && meets(row, row->then_us, row->then_ratio))
		return "then";
	if (has_first && meets(row, row->first_us, row->first_ratio))
		return "first";
	return has_then || has_first ? "no" : "";
}

static void print_number(FILE *file, double value, int width, int digits)
{
	if (value > 0)
		(void)fprintf(file, " %*.*f", width, digits, value);
	else
		(void)fprintf(file, " %*s", width, "-");
}

void gpu_print_head(const struct gpu_bench *bench)
{
	if (!bench->table)
		return;
	(void)fprintf(bench->table,
		"%s at %s: copies in device memory %.0f GB/s (read and written), to the host %.1f, from the host %.1f "
		"GB/s; "
		"bf16 products %.0f TFLOP/s; two events alone %.1f us\n",
		bench->cuda->name, bench->cuda->bus_id, bench->copy_rate / 1e9, bench->to_host_rate / 1e9,
		bench->from_host_rate / 1e9, bench->matrix_rate / 1e12, bench->idle_us);
	(void)fprintf(bench->table, "%-26s %10s %10s %8s %10s %8s %8s %-5s  %s\n", "id", "us", "floor us", "of floor",
		"rival us", "of rival", "GB/s", "bar", "work");
	(void)fflush(bench->table);
}

static void print_row(FILE *file, const struct gpu_row *row)
{
	(void)fprintf(file, "%-26s %10.1f", row->id, row->us);
	print_number(file, row->floor_us, 10, 1);
	print_number(file, row->floor_us / row->us, 8, 2);
	print_number(file, row->rival_us, 10, 1);
	print_number(file, row->rival_us > 0 ? row->us / row->rival_us : 0, 8, 3);
	print_number(file, row->rate / 1e9, 8, 1);
	(void)fprintf(file, " %-5s  %s", bar_met(row), row->work ? row->work : "");
	if (row->floor_us > 0 && row->floor)
		(void)fprintf(file, "; floor: %s", row->floor);
	if (row->rival)
		(void)fprintf(file, "; rival: %s", row->rival);
	(void)fputc('\n', file);
	(void)fflush(file);
}

static void set_number(json_t *object, const char *key, double value)
{
	if (value > 0)
		(void)json_object_set_new(object, key, json_real(value));
}

static void set_text(json_t *object, const char *key, const char *value)
{
	if (value && *value)
		(void)json_object_set_new(object, key, json_string(value));
}

static json_t *row_json(const struct gpu_row *row)
{
	json_t *object = json_object();

	set_text(object, "id", row->id);
	set_text(object, "work", row->work);
	set_number(object, "us", row->us);
	set_number(object, "floor_us", row->floor_us);
	set_text(object, "floor", row->floor_us > 0 ? row->floor : NULL);
	set_number(object, "of_floor", row->floor_us / row->us);
	set_text(object, "rival", row->rival);
	set_number(object, "rival_us", row->rival_us);
	set_number(object, "of_rival", row->rival_us > 0 ? row->us / row->rival_us : 0);
	set_number(object, "first_us", row->first_us);
	set_number(object, "then_us", row->then_us);
	set_number(object, "first_ratio", row->first_ratio);
	set_number(object, "then_ratio", row->then_ratio);
	if (row->first_ratio > 0 || row->then_ratio > 0)
		set_text(object, "ratio", row->ratio_of_floor ? "floor" : "rival");
	set_number(object, "bytes_per_second", row->rate);
	set_text(object, "bar", bar_met(row));
	return object;
}

static double finite_or_zero(double value)
{
	return isfinite(value) ? value : 0;
}

void gpu_row(struct gpu_bench *bench, const struct gpu_row *given)
{
	struct gpu_row row = *given;

	if (!gpu_wants(bench, row.id))
		return;
	if (!(row.us > 0) || !isfinite(row.us)) {
		(void)fprintf(stderr, "kvgate-bench: gpu: %s was not measured\n", row.id);
		bench->failed = true;
		return;
	}
	/* A rate that could not be measured is 0, and what was divided by it is not a number. */
	row.floor_us = finite_or_zero(row.floor_us);
	row.rival_us = finite_or_zero(row.rival_us);
	if (bench->table)
		print_row(bench->table, &row);
	(void)json_array_append_new(bench->rows, row_json(&row));
}

/* The version of the kernel driver, or "". */
static void read_driver_version(char text[64])
{
	FILE *file = fopen("/sys/module/nvidia/version", "re");

	text[0] = '\0';
	if (!file)
		return;
	if (fgets(text, 64, file))
		text[strcspn(text, "\n")] = '\0';
	(void)fclose(file);
}

static json_t *machine_json(const struct gpu_bench *bench)
{
	json_t *object = json_object();
	int version = bench->cuda->driver->version;
	char text[64];

	set_text(object, "gpu", bench->cuda->name);
	set_text(object, "bus_id", bench->cuda->bus_id);
	(void)snprintf(text, sizeof(text), "%d.%d", bench->cuda->capability / 10, bench->cuda->capability % 10);
	set_text(object, "capability", text);
	(void)json_object_set_new(object, "multiprocessors", json_integer(bench->cuda->sm_count));
	(void)json_object_set_new(object, "memory_bytes", json_integer((json_int_t)bench->cuda->total_memory));
	(void)snprintf(text, sizeof(text), "%d.%d", version / 1000, version % 1000 / 10);
	set_text(object, "cuda", text);
	read_driver_version(text);
	set_text(object, "driver", text);
	return object;
}

static json_t *rates_json(const struct gpu_bench *bench)
{
	json_t *object = json_object();

	set_number(object, "copy_bytes_per_second", bench->copy_rate);
	set_number(object, "to_host_bytes_per_second", bench->to_host_rate);
	set_number(object, "from_host_bytes_per_second", bench->from_host_rate);
	set_number(object, "matrix_operations_per_second", bench->matrix_rate);
	set_number(object, "idle_us", bench->idle_us);
	return object;
}

int gpu_write_json(const struct gpu_bench *bench, const char *path, bool failed)
{
	json_t *object = json_object();
	time_t now = time(NULL);
	struct tm utc;
	char date[32];
	int r;

	(void)strftime(date, sizeof(date), "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&now, &utc));
	set_text(object, "program", "kvgate-bench gpu");
	set_text(object, "version", KVG_VERSION);
	set_text(object, "date", date);
	(void)json_object_set_new(object, "machine", machine_json(bench));
	(void)json_object_set_new(object, "rates", rates_json(bench));
	(void)json_object_set_new(object, "failed", json_boolean(failed));
	(void)json_object_set(object, "rows", bench->rows);
	if (strcmp(path, "-") == 0) {
		r = json_dumpf(object, stdout, JSON_INDENT(1) | JSON_REAL_PRECISION(6));
		(void)fputc('\n', stdout);
	} else {
		r = json_dump_file(object, path, JSON_INDENT(1) | JSON_REAL_PRECISION(6));
	}
	json_decref(object);
	return r < 0 ? -EIO : 0;
}
