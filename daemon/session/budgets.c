#include "daemon/session/budgets.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "daemon/base/cleanup.h"
#include "daemon/base/log.h"
#include "proto/size.h"

#define FILE_NAME "budgets.conf"
#define SPACES    " \t\r\n"

#define FILE_MAX_BYTES (1 << 20)

struct entry {
	struct tenant *tenant;
	struct budget_values configured; /* all are set */
	struct budget_values live;
};

struct budgets {
	char *dir, *path, *new_path;
	struct entry *entries;
	size_t count;
	struct executor *files; /* writes them */
	struct list changes;    /* the first of them is under way when it is busy */
	bool busy;
	/* Of the change under way: the job's while there is one. */
	struct job job;
	struct budget_values before, after, live;
	char *old_text, *new_text; /* of the file */
};

static const char *const key_names[BUDGET_KEYS] = {
	"device.min", "device.high", "device.max", "host.min", "host.high", "host.max"};

const char *budget_key_name(unsigned key)
{
	return key_names[key];
}

static struct budget_values current(const struct tenant *tenant)
{
	struct budget_values values;

	for (unsigned tier = 0; tier < TENANT_TIERS; tier++) {
		struct budget budget = tenant_budget(tenant, (enum tenant_tier)tier);

		values.bytes[tier * 3] = budget.min;
		values.bytes[tier * 3 + 1] = budget.high;
		values.bytes[tier * 3 + 2] = budget.max;
	}
	for (unsigned key = 0; key < BUDGET_KEYS; key++)
		values.set[key] = true;
	return values;
}

int budgets_new(
	struct loop *loop, struct tenant *const *tenants, size_t tenant_count, const char *dir, struct budgets **ret)
{
	struct budgets *budgets = calloc(1, sizeof(*budgets));
	int r;

	if (!budgets)
		return -ENOMEM;
	list_init(&budgets->changes);
	budgets->entries = calloc(tenant_count, sizeof(struct entry));
	budgets->dir = strdup(dir);
	if (asprintf(&budgets->path, "%s/" FILE_NAME, dir) < 0)
		budgets->path = NULL;
	if (asprintf(&budgets->new_path, "%s/" FILE_NAME ".new", dir) < 0)
		budgets->new_path = NULL;
	r = budgets->entries && budgets->dir && budgets->path && budgets->new_path ? executor_new(loop, &budgets->files)
										   : -ENOMEM;
	if (r < 0) {
		(void)budgets_free(budgets);
		return r;
	}
	for (; budgets->count < tenant_count; budgets->count++)
		budgets->entries[budgets->count] = (struct entry){
			.tenant = tenants[budgets->count], .configured = current(tenants[budgets->count])};
	*ret = budgets;
	return 0;
}

struct budgets *budgets_free(struct budgets *budgets)
{
	if (!budgets)
		return NULL;
	(void)executor_free(budgets->files);
	free(budgets->dir);
	free(budgets->path);
	free(budgets->new_path);
	free(budgets->entries);
	free(budgets);
	return NULL;
}

bool budgets_are_live(const struct budgets *budgets, size_t tenant)
{
	for (unsigned key = 0; key < BUDGET_KEYS; key++)
		if (budgets->entries[tenant].live.set[key])
			return true;
	return false;
}

/* ---- setting ---- */

/* The configuration's values, but for those that were set. */
static struct budget_values merge(const struct budget_values *under, const struct budget_values *over)
{
	struct budget_values merged = *under;

	for (unsigned key = 0; key < BUDGET_KEYS; key++)
		if (over->set[key])
			merged.bytes[key] = over->bytes[key];
	return merged;
}

static int set_tier(struct tenant *tenant, enum tenant_tier tier, const struct budget_values *values, char *text)
{
	const uint64_t *bytes = values->bytes + tier * 3u;

	return quota_set(tier == TENANT_HOST ? &tenant->host : &tenant->quota, bytes[0], bytes[1], bytes[2], text);
}

/* Both tiers or none. The memory of the device's min follows when that is final. */
static int set_accounts(struct tenant *tenant, const struct budget_values *values, char *text)
{
	struct budget_values before = current(tenant);
	int r = set_tier(tenant, TENANT_DEVICE, values, text);

	if (r < 0)
		return r;
	r = set_tier(tenant, TENANT_HOST, values, text);
	if (r < 0) {
		char none[QUOTA_TEXT];

		(void)set_tier(tenant, TENANT_DEVICE, &before, none); /* as it was just now, so that it fits */
	}
	return r;
}

static void log_changes(const struct tenant *tenant, const struct budget_values *from, const struct budget_values *to)
{
	char a[KVG_SIZE_TEXT], b[KVG_SIZE_TEXT];

	for (unsigned key = 0; key < BUDGET_KEYS; key++)
		if (from->bytes[key] != to->bytes[key])
			log_info("%s: %s %s -> %s", tenant->quota.name, key_names[key],
				kvg_size_format(from->bytes[key], a), kvg_size_format(to->bytes[key], b));
}

/* ---- the file, on the executor for files ---- */

static bool write_entry(FILE *file, const struct entry *entry, const struct budget_values *live)
{
	bool named = false;

	for (unsigned key = 0; key < BUDGET_KEYS; key++) {
		if (!live->set[key])
			continue;
		if (!named && fprintf(file, "\n[tenant %s]\n", entry->tenant->name) < 0)
			return false;
		named = true;
		if (fprintf(file, "%s = %" PRIu64 "\n", key_names[key], live->bytes[key]) < 0)
			return false;
	}
	return true;
}

/* What the file says when `changed` has those live values, to be freed; NULL: no memory. On the reactor. */
static char *file_text(const struct budgets *budgets, const struct entry *changed, const struct budget_values *live)
{
	char *text = NULL;
	size_t size = 0;
	FILE *file = open_memstream(&text, &size);
	bool written;

	if (!file)
		return NULL;
	written = fputs("# Budgets that were set while kvgated ran. They come before those of the configuration;\n"
			"# kvgatectl budget reset TENANT takes a tenant's out.\n",
			  file) >= 0;
	for (size_t i = 0; written && i < budgets->count; i++)
		written = write_entry(
			file, &budgets->entries[i], &budgets->entries[i] == changed ? live : &budgets->entries[i].live);
	if (fclose(file) == 0 && written)
		return text;
	free(text);
	return NULL;
}

static int write_new(const struct budgets *budgets, const char *text)
{
	_cleanup_close_ int fd = open(budgets->new_path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
	size_t left = strlen(text);

	if (fd < 0)
		return -errno;
	while (left > 0) {
		ssize_t n = write(fd, text, left);

		if (n < 0)
			return -errno;
		text += n;
		left -= (size_t)n;
	}
	return fsync(fd) < 0 ? -errno : 0;
}

static int sync_dir(const struct budgets *budgets)
{
	_cleanup_close_ int fd = open(budgets->dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

	return fd < 0 || fsync(fd) < 0 ? -errno : 0;
}

static int save(const struct budgets *budgets, const char *text)
{
	int r = write_new(budgets, text);

	if (r >= 0 && rename(budgets->new_path, budgets->path) < 0)
		r = -errno;
	if (r >= 0)
		return sync_dir(budgets);
	(void)unlink(budgets->new_path);
	return r;
}

static void save_run(struct job *job)
{
	struct budgets *budgets = list_entry(job, struct budgets, job);
	struct budget_change *change = list_entry(budgets->changes.next, struct budget_change, node);

	change->status = save(budgets, budgets->new_text);
	if (change->status < 0)
		(void)save(budgets, budgets->old_text); /* it may have been written all the same */
}

/* ---- changes ---- */

static void save_done(struct job *job);

static void free_texts(struct budgets *budgets)
{
	free(budgets->old_text);
	free(budgets->new_text);
	budgets->old_text = budgets->new_text = NULL;
}

/* The old values, with what the larger min claims: from there the way to either is free, whatever others take. */
static struct budget_values between(const struct budget_values *before, const struct budget_values *after)
{
	struct budget_values values = *before;

	for (unsigned i = 0; i < BUDGET_KEYS; i += BUDGET_KEYS / TENANT_TIERS) {
		uint64_t *bytes = values.bytes + i; /* min, high, max */

		if (after->bytes[i] > bytes[0])
			bytes[0] = after->bytes[i];
		if (bytes[1] && bytes[1] < bytes[0])
			bytes[1] = bytes[0];
		if (bytes[2] < bytes[0])
			bytes[2] = bytes[0];
	}
	return values;
}

static struct budget_values new_live(const struct entry *entry, const struct budget_change *change)
{
	struct budget_values live = entry->live;

	if (change->reset)
		return (struct budget_values){0};
	for (unsigned key = 0; key < BUDGET_KEYS; key++) {
		if (!change->values.set[key])
			continue;
		live.set[key] = true;
		live.bytes[key] = change->values.bytes[key];
	}
	return live;
}

/* 0 when the file is being written, or a negative errno with text. */
static int begin(struct budgets *budgets, struct budget_change *change)
{
	struct entry *entry = &budgets->entries[change->tenant];
	struct budget_values meanwhile;
	int r;

	budgets->old_text = file_text(budgets, entry, &entry->live);
	budgets->before = current(entry->tenant);
	budgets->live = new_live(entry, change);
	budgets->after = merge(&entry->configured, &budgets->live);
	budgets->new_text = file_text(budgets, entry, &budgets->live);
	(void)snprintf(change->text, BUDGET_TEXT, "budgets: out of memory");
	r = budgets->old_text && budgets->new_text ? set_accounts(entry->tenant, &budgets->after, change->text)
						   : -ENOMEM;
	if (r < 0) {
		free_texts(budgets);
		return r;
	}
	meanwhile = between(&budgets->before, &budgets->after);
	(void)set_accounts(entry->tenant, &meanwhile, change->text);
	budgets->job = (struct job){.run = save_run, .done = save_done};
	executor_submit(budgets->files, &budgets->job);
	return 0;
}

static void end(struct budget_change *change, int status)
{
	change->status = status;
	list_remove(&change->node);
	change->done(change);
}

/* Those that are refused are over at once. */
static void go_on(struct budgets *budgets)
{
	budgets->busy = true; /* done() may ask for more */
	while (!list_empty(&budgets->changes)) {
		struct budget_change *change = list_entry(budgets->changes.next, struct budget_change, node);
		int r = begin(budgets, change);

		if (r >= 0)
			return;
		end(change, r);
	}
	budgets->busy = false;
}

static void save_done(struct job *job)
{
	struct budgets *budgets = list_entry(job, struct budgets, job);
	struct budget_change *change = list_entry(budgets->changes.next, struct budget_change, node);
	struct entry *entry = &budgets->entries[change->tenant];
	bool saved = change->status >= 0;

	free_texts(budgets);
	(void)set_accounts(entry->tenant, saved ? &budgets->after : &budgets->before, change->text);
	if (saved) {
		entry->live = budgets->live;
		log_changes(entry->tenant, &budgets->before, &budgets->after);
	} else {
		(void)snprintf(change->text, BUDGET_TEXT, "%s: cannot be written: %s; nothing was changed",
			budgets->path, strerror(-change->status));
	}
	reserve_update(&entry->tenant->reserve);
	end(change, change->status);
	go_on(budgets);
}

void budgets_change(struct budgets *budgets, struct budget_change *change)
{
	list_add_tail(&budgets->changes, &change->node);
	if (!budgets->busy)
		go_on(budgets);
}

/* ---- the start ---- */

struct reader {
	struct budgets *budgets;
	struct entry *entry; /* of the section; NULL: of nobody */
	unsigned line;
};

static void __attribute__((format(printf, 2, 3))) ignore(const struct reader *reader, const char *format, ...)
{
	char text[BUDGET_TEXT];
	va_list arguments;

	va_start(arguments, format);
	(void)vsnprintf(text, sizeof(text), format, arguments);
	va_end(arguments);
	log_warning("%s:%u: ignored: %s", reader->budgets->path, reader->line, text);
}

static struct entry *find_entry(const struct budgets *budgets, const char *name)
{
	for (size_t i = 0; i < budgets->count; i++)
		if (strcmp(budgets->entries[i].tenant->name, name) == 0)
			return &budgets->entries[i];
	return NULL;
}

/* "[tenant NAME]" */
static void read_section(struct reader *reader, char *line)
{
	size_t length = strlen(line);

	reader->entry = NULL;
	if (strncmp(line, "[tenant ", 8) != 0 || line[length - 1] != ']') {
		ignore(reader, "'%.100s' is not [tenant NAME]", line);
		return;
	}
	line[length - 1] = '\0';
	reader->entry = find_entry(reader->budgets, line + 8);
	if (!reader->entry)
		ignore(reader, "there is no tenant %.100s any more", line + 8);
}

/* "device.max = 1048576" */
static void read_value(struct reader *reader, char *line)
{
	char *value = strchr(line, '='), *end;
	unsigned key = 0;

	if (value) {
		*value++ = '\0';
		value += strspn(value, SPACES);
		for (end = line + strlen(line); end > line && strchr(SPACES, end[-1]);)
			*--end = '\0';
		while (key < BUDGET_KEYS && strcmp(line, key_names[key]) != 0)
			key++;
	}
	if (!value || key == BUDGET_KEYS)
		ignore(reader, "'%.100s' is no budget", line);
	else if (reader->entry && kvg_size_parse(value, &reader->entry->live.bytes[key]) < 0)
		ignore(reader, "%s: '%.100s' is not a size", line, value);
	else if (reader->entry)
		reader->entry->live.set[key] = true;
}

static void read_line(struct reader *reader, char *line)
{
	size_t length = strlen(line);

	reader->line++;
	while (length > 0 && strchr(SPACES, line[length - 1]))
		line[--length] = '\0';
	line += strspn(line, SPACES);
	if (line[0] == '[')
		read_section(reader, line);
	else if (line[0] != '\0' && line[0] != '#' && line[0] != ';')
		read_value(reader, line);
}

/* Whether it is a regular file of a size that this daemon may have written. 0 or a negative errno. */
static int check_file(int fd)
{
	struct stat st;

	if (fd < 0 || fstat(fd, &st) < 0)
		return -errno;
	if (!S_ISREG(st.st_mode))
		return S_ISDIR(st.st_mode) ? -EISDIR : -EINVAL;
	return st.st_size > FILE_MAX_BYTES ? -EFBIG : 0;
}

static int open_file(const struct budgets *budgets, FILE **ret)
{
	int fd = open(budgets->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK), r = check_file(fd);

	*ret = r < 0 ? NULL : fdopen(fd, "r");
	if (*ret)
		return 0;
	if (r >= 0)
		r = -errno;
	if (fd >= 0)
		(void)close(fd);
	return r;
}

static int read_file(struct budgets *budgets)
{
	struct reader reader = {.budgets = budgets};
	char *line = NULL;
	size_t size = 0;
	FILE *file;
	int r = open_file(budgets, &file);

	if (r < 0)
		return r == -ENOENT ? 0 : r;
	errno = 0;
	while (getline(&line, &size, file) >= 0)
		read_line(&reader, line);
	if (!feof(file))
		r = errno ? -errno : -EIO;
	free(line);
	(void)fclose(file);
	return r;
}

/* Whether some live value of the tier waits to be set. */
static bool is_waiting(const struct entry *entry, enum tenant_tier tier)
{
	const struct budget_values now = current(entry->tenant), wanted = merge(&entry->configured, &entry->live);

	return memcmp(now.bytes + tier * 3u, wanted.bytes + tier * 3u, 3 * sizeof(uint64_t)) != 0;
}

/* Sets one tier of a tenant, if it can be. */
static int try_tier(const struct entry *entry, enum tenant_tier tier, char *text)
{
	const struct budget_values wanted = merge(&entry->configured, &entry->live);

	return set_tier(entry->tenant, tier, &wanted, text);
}

/* One tenant's min may wait for that of another to go down: again and again, as long as something comes of it. */
static void set_all(struct budgets *budgets)
{
	char text[QUOTA_TEXT];
	bool moved;

	do {
		moved = false;
		for (size_t i = 0; i < budgets->count * TENANT_TIERS; i++) {
			const struct entry *entry = &budgets->entries[i / TENANT_TIERS];
			enum tenant_tier tier = (enum tenant_tier)(i % TENANT_TIERS);

			moved |= is_waiting(entry, tier) && try_tier(entry, tier, text) >= 0;
		}
	} while (moved);
}

static void drop_misfits(struct budgets *budgets)
{
	char text[QUOTA_TEXT];

	for (size_t i = 0; i < budgets->count * TENANT_TIERS; i++) {
		struct entry *entry = &budgets->entries[i / TENANT_TIERS];
		enum tenant_tier tier = (enum tenant_tier)(i % TENANT_TIERS);

		if (!is_waiting(entry, tier) || try_tier(entry, tier, text) >= 0)
			continue;
		log_warning("%s: ignored, the configuration holds: %s", budgets->path, text);
		memset(entry->live.set + tier * 3u, 0, 3 * sizeof(bool));
	}
}

static void look_at_dir(const struct budgets *budgets)
{
	int r = mkdir(budgets->dir, 0755) < 0 && errno != EEXIST ? -errno : 0;

	if (r >= 0 && faccessat(AT_FDCWD, budgets->dir, W_OK | X_OK, AT_EACCESS) < 0)
		r = -errno;
	if (r < 0)
		log_warning("%s: %s: budgets cannot be set while the daemon runs", budgets->dir, strerror(-r));
}

int budgets_load(struct budgets *budgets, char *text)
{
	int r = read_file(budgets);

	if (r < 0) {
		(void)snprintf(text, BUDGET_TEXT, "%s: cannot be read: %s", budgets->path, strerror(-r));
		return r;
	}
	look_at_dir(budgets);
	set_all(budgets);
	drop_misfits(budgets);
	for (size_t i = 0; i < budgets->count; i++) {
		const struct entry *entry = &budgets->entries[i];
		const struct budget_values now = current(entry->tenant);

		log_changes(entry->tenant, &entry->configured, &now);
		reserve_update(&entry->tenant->reserve);
	}
	return 0;
}
