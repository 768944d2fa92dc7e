#include "users.h"

#include <grp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { COLUMNS = 7, LINE = 65536 };

static char line[LINE];

/* Split the next line of a passwd-like file in place; lines with fewer columns, or too long, are passed over. */
static bool next_entry(FILE *file, char *columns[COLUMNS], int wanted)
{
    while (fgets(line, sizeof line, file)) {
        char *rest = line;
        int count = 0;
        line[strcspn(line, "\n")] = 0;
        while (rest && count < COLUMNS)
            columns[count++] = strsep(&rest, ":");
        if (count >= wanted)
            return true;
    }
    return false;
}

static bool parse_id(const char *text, unsigned *id)
{
    char *end;
    unsigned long value;

    if (*text < '0' || *text > '9')
        return false;
    value = strtoul(text, &end, 10);
    *id = (unsigned)value;
    return *end == 0 && value < 0xffffffffUL;
}

/* By name, else by number. A number without an entry is fine. */
static bool find_user(const char *name, struct user *user, char *login, size_t login_size)
{
    FILE *file = fopen("/etc/passwd", "re");
    char *columns[COLUMNS];
    unsigned id = 0, entry_id, entry_group;
    bool is_number = parse_id(name, &id), found = false;

    while (file && !found && next_entry(file, columns, 6)) {
        if (!parse_id(columns[2], &entry_id) || !parse_id(columns[3], &entry_group))
            continue;
        found = strcmp(columns[0], name) == 0 || (is_number && entry_id == id);
        if (!found)
            continue;
        user->id = entry_id;
        user->group = entry_group;
        snprintf(login, login_size, "%s", columns[0]);
        snprintf(user->home, sizeof user->home, "%s", columns[5]);
    }
    if (file)
        fclose(file);
    if (!found && is_number)
        user->id = id;
    return found || is_number;
}

static bool find_group(const char *name, gid_t *group)
{
    FILE *file = fopen("/etc/group", "re");
    char *columns[COLUMNS];
    unsigned id;
    bool found = false;

    while (file && !found && next_entry(file, columns, 3))
        if (strcmp(columns[0], name) == 0 && parse_id(columns[2], &id)) {
            *group = id;
            found = true;
        }
    if (file)
        fclose(file);
    if (!found && parse_id(name, &id)) {
        *group = id;
        found = true;
    }
    return found;
}

static bool lists_member(char *members, const char *login)
{
    char *member;

    while ((member = strsep(&members, ",")))
        if (strcmp(member, login) == 0)
            return true;
    return false;
}

static void find_supplementary(const char *login, struct user *user)
{
    FILE *file = fopen("/etc/group", "re");
    char *columns[COLUMNS];
    unsigned id;

    while (file && user->group_count < sizeof user->groups / sizeof user->groups[0] && next_entry(file, columns, 4))
        if (parse_id(columns[2], &id) && lists_member(columns[3], login))
            user->groups[user->group_count++] = id;
    if (file)
        fclose(file);
}

int users_find(const char *name, struct user *user, struct notice *notice)
{
    char person[256], login[256] = "";
    unsigned number;

    memset(user, 0, sizeof *user);
    strcpy(user->home, "/root");
    if (!name || !*name)
        return 0; /* no file is read on the way of most execs */
    strcpy(user->home, "/");
    size_t length = strcspn(name, ":");
    snprintf(person, sizeof person, "%.*s", (int)length, name);
    if (*person == 0 || !find_user(person, user, login, sizeof login)) {
        launch_complain_text(notice, "user %s is not in the image's /etc/passwd", person);
        return -1;
    }
    if (name[length] == ':' && name[length + 1]) {
        if (find_group(name + length + 1, &user->group))
            return 0;
        launch_complain_text(notice, "group %s is not in the image's /etc/group", name + length + 1);
        return -1;
    }
    /* Supplementary groups only for a name without a group (OCI image specification, conversion.md). */
    if (!parse_id(person, &number))
        find_supplementary(login, user);
    return 0;
}

int users_become(const struct user *user)
{
    /* A test without root has a user namespace in which setgroups(2) is denied to all. */
    if (setgroups(user->group_count, user->groups) && !report_test_mode)
        return -1;
    return setgid(user->group) || setuid(user->id) ? -1 : 0;
}
