/*
 * config.h - the configuration file (ini; packaging/kvgated.conf describes every key).
 *
 *   [pool]   device.size, extent_size
 *   [daemon] spin_us
 *   [admin]  socket, mode, group
 *   [tenant NAME] socket, mode, uids, device.max
 *
 * An unknown section or key, a value of the wrong form, and a value that contradicts another
 * are errors that name file, line, key, value and limit.
 */
#ifndef KVG_CONFIG_H
#define KVG_CONFIG_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define CONFIG_TEXT 512

struct config_tenant {
	char *name;
	char *socket; /* a relative path counts from the state directory; default NAME.sock */
	mode_t mode;  /* default 0600 */
	uid_t *uids;  /* empty: whoever the socket's mode lets in */
	size_t uid_count;
	uint64_t device_max; /* default: the pool's size */
};

struct config {
	uint64_t device_size;
	uint64_t extent_size; /* a power of two, 64 KiB to 1 GiB; default: grows with the pool, at most about 2000
				 extents, at least 256 KiB */
	uint32_t spin_us;     /* default 50 */
	char *admin_socket;   /* NULL: STATE_DIR/admin.sock */
	mode_t admin_mode;    /* default 0660 */
	char *admin_group;    /* NULL: leave the group */
	struct config_tenant *tenants; /* at least one, names and sockets unique */
	size_t tenant_count;
};

/* Reads a file. 0 or a negative errno with text (CONFIG_TEXT bytes). */
int config_read(const char *path, struct config *ret, char *text);
void config_deinit(struct config *config);

#endif
