/*
 * config.h - the configuration file (ini; packaging/kvgated.conf describes every key).
 *
 *   [pool]   kind, device.index, device.size, extent_size, host.size
 *   [daemon] spin_us, isolation, wait_ms, pressure_ms, budgets_dir
 *   [admin]  socket, mode, group
 *   [tenant NAME] socket, mode, uids, ipc, device.min, device.high, device.max, host.min, host.high, host.max,
 *                 max_connections, max_sequences, max_layouts, max_entries, max_staged_rows
 *
 * An unknown section or key, a value of the wrong form, and a value that contradicts another
 * are errors that name file, line, key, value and limit.
 */
#ifndef KVG_CONFIG_H
#define KVG_CONFIG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "daemon/tenant/tenant.h"

#define CONFIG_TEXT 512

enum config_kind { CONFIG_HOST = 0, CONFIG_CUDA = 1 };
enum config_isolation { CONFIG_SHARED = 0, CONFIG_STRICT = 1 };

struct config_tenant {
	char *name;
	char *socket; /* a relative path counts from the state directory; default NAME.sock */
	mode_t mode;  /* default 0600 */
	uid_t *uids;  /* empty: whoever the socket's mode lets in */
	size_t uid_count;
	/*
	 * By enum tenant_tier; min <= high <= max <= the pool's, and the min of all tenants fit in the pool. Default:
	 * no min, no high, max as large as the pool.
	 */
	struct budget budgets[TENANT_TIERS];
	struct tenant_limits limits; /* default: TENANT_LIMITS */
	bool ipc;                    /* default no */
};

struct config {
	enum config_kind kind; /* default host */
	uint32_t device_index; /* cuda: the GPU's ordinal; default 0 */
	uint64_t device_size;
	uint64_t extent_size; /* a power of two, 64 KiB (cuda: 2 MiB) to 1 GiB; default: grows with the pool, at most
				 about 2000 extents, at least 256 KiB (cuda: about 512 and at least 2 MiB, and from
				 64 MiB on about 2000) */
	uint64_t host_size;   /* of the host tier; default 0: there is none */
	uint32_t spin_us;     /* default 50 */
	enum config_isolation isolation; /* default shared */
	uint32_t wait_ms;                /* default 10000 */
	uint32_t pressure_ms;            /* default 10000 */
	char *budgets_dir;  /* NULL: as the options of the start say; a relative path counts from the state directory */
	char *admin_socket; /* NULL: STATE_DIR/admin.sock */
	mode_t admin_mode;  /* default 0660 */
	char *admin_group;  /* NULL: leave the group */
	struct config_tenant *tenants; /* at least one, names and sockets unique */
	size_t tenant_count;
};

/* Reads a file. 0 or a negative errno with text (CONFIG_TEXT bytes). */
int config_read(const char *path, struct config *ret, char *text);
void config_deinit(struct config *config);

#endif
